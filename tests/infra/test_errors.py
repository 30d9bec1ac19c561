"""Run: pytest tests/infra/test_errors.py"""

import inspect
import pickle

import pytest

from bitdgdm.infra import errors
from bitdgdm.infra.errors import BadInput, BitDGDMError, Retryable

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, BitDGDMError) and kind not in (BitDGDMError, BadInput, Retryable)
]


def example(kind: type[BitDGDMError]) -> BitDGDMError:
    """One of `kind`, with a value of the right type for each argument."""
    given = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        annotation = str(parameter.annotation)
        numbers = [1, 2] if "int" in annotation else ["one", "two"]
        plain = 3 if "int" in annotation else 4.5 if "float" in annotation else f"some {name}"
        given[name] = numbers if "Iterable" in annotation else plain
    return kind(**given)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line_that_keeps_its_fields_when_pickled(kind):
    error = example(kind)
    assert str(error) and "\n" not in str(error)
    assert error.exit_code in (1, 2, 3, 4, 75) and error.retryable == (error.exit_code == 75)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is kind and str(copy) == str(error) and vars(copy) == vars(error)
    assert set(inspect.signature(kind).parameters) <= set(vars(error))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_can_be_raised_again_with_its_cause(kind):
    with pytest.raises(kind) as caught:
        try:
            raise OSError("below")
        except OSError as error:
            raise pickle.loads(pickle.dumps(example(kind))) from error  # noqa: S301
    assert isinstance(caught.value.__cause__, OSError)
