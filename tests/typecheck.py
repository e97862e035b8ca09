"""The checker behind jaxtyping's import hook: shapes and types of every call into the mathematics are verified in tests."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
