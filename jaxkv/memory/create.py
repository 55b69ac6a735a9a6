"""`create` as users have it: where a cache does not fit, its error says what would."""

from jaxkv.cache.create import create as create_or_fail
from jaxkv.memory.allocate import explained

create = explained(create_or_fail)
