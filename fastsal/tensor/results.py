"""What results of B examples share: they are short in print, can be cut, joined, compared, moved, saved and tabulated."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsal.files import extra, whole_file

R = TypeVar("R", bound="Results")


class Results:
    """Results of B examples, a frozen dataclass: every tensor has an entry an example, [B, ...], other fields hold for all.

    `len(results)` is B. `results[k]`, for a number, is one example, whose tensors have lost the B; for a slice, a mask or
    indices (a list, an array or a tensor) it is some of the examples. Iteration goes over single examples. `==` says whether
    all fields have the same dtypes, shapes and values, NaN equal to NaN, on whatever device.
    """

    _axes: ClassVar[tuple[str, ...]] = ("example",)  # of the tensors that are columns of `to_pandas`
    _shown: ClassVar[tuple[str, ...]]  # in print; the first of them has these axes

    @property
    def _values(self) -> dict[str, Any]:
        """The fields by name, as they were given."""
        return {field.name: vars(self).get(field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._values.items() if isinstance(value, Tensor)}

    @property
    def _is_one(self) -> bool:
        """Whether this is a single example."""
        return self._tensors[self._shown[0]].dim() < len(self._axes)

    def _each(self: R, change: Callable[[Tensor], Tensor]) -> R:
        return type(self)(**self._values | {name: change(value) for name, value in self._tensors.items()})

    def _batch(self: R) -> R:
        """A single example as a batch of one."""
        return self._each(lambda value: value.unsqueeze(0)) if self._is_one else self

    def __len__(self) -> int:
        if self._is_one:
            raise TypeError(f"{type(self).__name__}: this is a single example, which has no length")
        return len(self._tensors[self._shown[0]])

    def __getitem__(self: R, index: Any) -> R:
        if index is None or index is ... or isinstance(index, bool | str | tuple):
            raise TypeError(f"index: got {index!r}, wants a whole number, a slice, a mask or indices of examples")
        B = len(self)
        if not isinstance(index, int | slice | Tensor):
            index = torch.as_tensor(np.asarray(index))
            index = index if index.numel() else index.long()  # an empty list
        if isinstance(index, int) and not -B <= index < B:
            raise IndexError(f"index: got {index}, wants one of {B} examples")
        return self._each(lambda value: value[index])

    def __iter__(self: R) -> Iterator[R]:
        return (self[k] for k in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, Results)
        return all(_same(value, other._values[name]) for name, value in self._values.items())

    __hash__ = None  # type: ignore[assignment]  # equal by value, and tensors can be written to

    def __repr__(self) -> str:
        return "\n".join(_lines(self))

    def to(self: R, device: Any) -> R:
        """The same with its tensors on a device."""
        return self._each(lambda value: value.to(torch.device(device)))

    def cpu(self: R) -> R:
        """The same with its tensors in the host's memory."""
        return self.to("cpu")

    def save(self, path: str | Path) -> None:
        """Writes all fields into a file, which `fastsal.load` reads; so does `torch.load`, with `weights_only`, as a dict.

        The file is there as a whole or not at all, and one that was there is replaced. Gradients are left behind.
        """
        detached = {
            name: value.detach().clone() for name, value in self._tensors.items()
        }  # no more than a view's own part
        with whole_file(Path(path)) as file:
            torch.save({"fastsal": type(self).__name__} | self._values | detached, file)

    def to_pandas(self) -> Any:
        """A pandas.DataFrame: one row an example, and a column for each field that has one value an example or for all.

        Of all pairs of classes (`PairwiseMargins`) a row is a pair, and what belongs to a class alone is left out. So are
        fields with more values an example, such as `distances` and saliency maps.
        """
        pandas, batch = extra("pandas", "pandas"), self._batch()
        columns = {
            name: value.detach().cpu().flatten().numpy() if isinstance(value, Tensor) else value
            for name, value in batch._values.items()
            if value is not None and (not isinstance(value, Tensor) or value.dim() == len(self._axes))
        }
        shape = batch._tensors[self._shown[0]].shape
        index = pandas.MultiIndex.from_product(map(range, shape), names=self._axes)
        return pandas.DataFrame(columns, index=index if len(shape) > 1 else index.get_level_values(0))


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    other = other.to(one.device)
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _lines(results: Results) -> Iterator[str]:
    """What is printed of a batch: the smallest, median and largest values of a few fields. Of one example: its values."""
    values, shown = results._values, () if results._is_one or not len(results) else results._shown
    about = [f"{name} {value!r}" for name, value in values.items() if isinstance(value, str | float)]
    count = "one example" if results._is_one else f"{len(results)} example{'s' * (len(results) != 1)}"
    yield f"{type(results).__name__} of {count}" + (f": {', '.join(about)}" if about else "")
    if shown:
        yield f"  {'':22}{'smallest':>12}{'median':>12}{'largest':>12}"
        yield from (f"  {name:22}{_spread(results._tensors[name].detach())}" for name in shown)
    rest = [_brief(name, value, results._is_one) for name, value in results._tensors.items() if name not in shown]
    rest += [f"{name} None" for name, value in values.items() if value is None]
    yield from textwrap.wrap(", ".join(rest), 100, initial_indent="  ", subsequent_indent="  ", break_long_words=False)


def _brief(name: str, value: Tensor, single: bool) -> str:
    if value.dim() == 0:
        return f"{name} {value.item():.6g}" if value.is_floating_point() else f"{name} {value.item()}"
    return name if value.dim() == 1 and not single else f"{name} {list(value.shape)}"


def _spread(values: Tensor) -> str:
    if values.dtype == torch.bool:
        return f"{int(values.sum()):12} of {values.numel()}"
    known = values[~values.isnan()].double()
    numbers = (known.min(), known.median(), known.max()) if len(known) else ()
    lost = values.numel() - len(known)
    return "".join(f"{number.item():12.6g}" for number in numbers) + (f"   ({lost} NaN left out)" if lost else "")


def cat(results: Iterable[R]) -> R:
    """Joins results of several batches, or single examples, into those of all their examples.

    Args:
        results: `Geometry`s, or `Adversarial`s, or `PairwiseMargins`, at least one, of the same classes and methods. Where
            failure probabilities differ, the largest is that of all.

    Returns:
        The same kind of result.

    Raises:
        TypeError: There is something else among them, or they are of several kinds.
        ValueError: There is none, or they do not go together; the message names the field.

    Examples:
        >>> import torch, fastsal
        >>> model, images = torch.nn.Linear(6, 3), torch.rand(20, 6)
        >>> whole = fastsal.cat(fastsal.analyze(model, part) for part in images.split(8))
        >>> len(whole), whole[:8] == fastsal.analyze(model, images[:8])
        (20, True)
    """
    parts = list(results)
    kinds = list(dict.fromkeys(type(part) for part in parts))
    if not parts:
        raise ValueError("results: got none, wants at least one")
    if len(kinds) > 1 or not isinstance(parts[0], Results):
        raise TypeError(
            f"results: got {', '.join(kind.__name__ for kind in kinds)}, wants results of fastsal of one kind"
        )
    batches = [part._batch() for part in parts]
    joined = {}
    for name in batches[0]._values:
        values = [batch._values[name] for batch in batches]
        if all(isinstance(value, Tensor) for value in values):
            try:
                joined[name] = torch.cat(values)
            except RuntimeError as error:
                raise ValueError(f"results: {name} cannot be joined: {error}") from error
        elif all(isinstance(value, float) for value in values):
            joined[name] = max(values)
        elif any(value is None for value in values) and any(isinstance(value, Tensor) for value in values):
            lacking = sum(value is None for value in values)
            raise ValueError(f"results: {lacking} of {len(values)} are without {name}, wants it in all or in none")
        elif len(set(values)) > 1:
            raise ValueError(
                f"results: got {name} {', '.join(map(repr, dict.fromkeys(values)))}, wants the same in all"
            )
        else:
            joined[name] = values[0]
    return kinds[0](**joined)


def read(path: Path) -> Any:
    """What `Results.save` wrote into a file. Nothing is unpickled but tensors, numbers and text.

    Raises:
        ValueError: The file is something else.
    """
    kinds = {kind.__name__: kind for kind in Results.__subclasses__()}
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        kind = kinds[found.pop("fastsal")]
        return kind(**{field.name: found[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
    except Exception as error:
        raise ValueError(
            f"results: {path} is no file that `save` of a result wrote ({type(error).__name__}); tables of `fastsal analyze` "
            "are read by pandas or NumPy"
        ) from error
