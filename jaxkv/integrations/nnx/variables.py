"""What an nnx variable holds: flax 0.11, which Colab has, reads and writes it by another name."""

from typing import Any

from flax import nnx


def value_of(variable: nnx.Variable[Any]) -> Any:
    """What the variable holds."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def set_value(variable: nnx.Variable[Any], value: Any) -> None:
    """Let the variable hold this value."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value
