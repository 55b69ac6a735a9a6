"""Who guesses the next tokens, several of which a step then checks: a file each."""

from jaxkv.drafts.draft import Draft, HiddenStateDraft, StatefulDraft
from jaxkv.drafts.draft_model import DraftModel
from jaxkv.drafts.mtp import MTP
from jaxkv.drafts.ngram import NGram

__all__ = ["MTP", "Draft", "DraftModel", "HiddenStateDraft", "NGram", "StatefulDraft"]
