"""What `JAXKV_TEST_TYPES=1 pytest` does to every function of jaxkv: its annotations are checked."""

from typing import Self

from beartype import BeartypeConf, BeartypeHintOverrides, beartype

# beartype knows Self in classes that it decorates whole, but jaxtyping decorates their methods;
# and an int is a float, as for any type checker.
checked = beartype(
    conf=BeartypeConf(hint_overrides=BeartypeHintOverrides({Self: object}), is_pep484_tower=True)
)
