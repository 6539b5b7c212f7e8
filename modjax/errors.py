"""Input that cannot be used, and how it is said."""

MOST_SHOWN = 400  # characters of a value in a message


class InputError(ValueError):
    """Input that cannot be used: one line with the field, its value and what would be accepted."""

    def __init__(self, field: str, value: object, accepted: str):
        self.field, self.value, self.accepted = field, value, accepted
        shown = repr(value)
        if len(shown) > MOST_SHOWN:
            shown = f"{shown[: MOST_SHOWN // 2]}...{shown[-MOST_SHOWN // 2 :]}"
        super().__init__(f"{field} = {shown}: {accepted}")


class SharedFault(InputError):
    """Bad input that would stop every other run of the sweep, too: its data or folder is gone."""


class Preempted(Exception):
    """SIGTERM arrived: the state of `step` is saved, and the same call goes on from there."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM at step {step}; state saved")
        self.step = step


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raises `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(field, value, accepted)


def require_one_of(field: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raises `InputError` unless `value` is one of `accepted`."""
    require(value in accepted, field, value, f"must be one of {', '.join(accepted)}")


def require_positive(config: object, prefix: str, *names: str) -> None:
    """Raises `InputError` unless these fields of `config` are greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than 0")
