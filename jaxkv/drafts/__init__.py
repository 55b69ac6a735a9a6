"""Who guesses the next tokens, several of which a step then checks: a file each."""

from jaxkv.drafts.draft import Draft, StatefulDraft
from jaxkv.drafts.draft_model import DraftModel
from jaxkv.drafts.ngram import NGram

__all__ = ["Draft", "DraftModel", "NGram", "StatefulDraft"]
