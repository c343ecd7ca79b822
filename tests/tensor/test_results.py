"""What results share: cut, joined, compared, moved, saved, tabulated, and short in print, with the parts that are not there."""

import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch

import fastsal

pytestmark = pytest.mark.usefixtures("one_thread")
B = 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))


@pytest.fixture
def x():
    return torch.randn(B, 7, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["geometry", "saliency", "certified", "adversarial", "pairs", "pairs and x", "nan"])
def results(request, model, x):
    """Each kind, and one of them with a NaN."""
    if request.param == "adversarial":
        return fastsal.deepfool(model, x)
    if request.param.startswith("pairs"):
        jacobian = torch.randn(B, 5, 7)
        return fastsal.pairwise_margins(torch.randn(B, 5), jacobian, x if "x" in request.param else None)
    if request.param == "nan":
        x[2, 3] = torch.nan
    method = "certified" if request.param == "certified" else "exact"
    return fastsal.analyze(model, x, method=method, keep_saliency=request.param == "saliency")


def tensors(results):
    return {name: value for name, value in vars(results).items() if isinstance(value, torch.Tensor)}


class TestIndex:
    @pytest.mark.parametrize(
        "index",
        [
            slice(1, 4),
            slice(None, None, 2),
            slice(0, 0),
            [4, 1],
            [],
            np.array([4, 1]),
            torch.tensor([True, False] * 3),
            np.array([True, False] * 3),
            2,
            -1,
            np.int64(3),
        ],
    )
    def test_cuts_every_tensor_alike(self, results, index):
        part = results[index]
        assert type(part) is type(results)
        for name, value in tensors(results).items():
            want = value.numpy()[np.asarray(index, dtype=int) if isinstance(index, list) else index]
            assert getattr(part, name).dtype == value.dtype
            np.testing.assert_array_equal(getattr(part, name).numpy(), want)

    def test_iterates_over_examples(self, results):
        assert len(results) == B
        for k, one in enumerate(results):
            assert one == results[k]
            with pytest.raises(TypeError, match="single example"):
                len(one)
            with pytest.raises(TypeError, match="single example"):
                one[0]

    @pytest.mark.parametrize("index", [None, ..., (0, 1), "bound", True])
    def test_what_is_no_index(self, results, index):
        with pytest.raises(TypeError, match="index: got "):
            results[index]

    def test_beyond_the_end(self, results):
        for index in (B, -B - 1, [B], torch.ones(B + 1, dtype=torch.bool)):
            with pytest.raises(IndexError):
                results[index]


class TestCat:
    def test_joins_what_was_cut(self, results):
        assert fastsal.cat([results[:2], results[2:2], results[2:]]) == results
        assert fastsal.cat(results) == results
        assert fastsal.cat(iter([results[3], results[4:]])) == results[3:]

    def test_what_does_not_go_together(self, model, x):
        exact = fastsal.analyze(model, x)
        with pytest.raises(ValueError, match="results: got none"):
            fastsal.cat([])
        with pytest.raises(TypeError, match="got Geometry, Adversarial, wants results of fastsal of one kind"):
            fastsal.cat([exact, fastsal.deepfool(model, x)])
        with pytest.raises(TypeError, match="got Tensor"):
            fastsal.cat(x)
        with pytest.raises(ValueError, match="1 of 2 are without saliency"):
            fastsal.cat([exact, fastsal.analyze(model, x, keep_saliency=True)])
        with pytest.raises(ValueError, match="distances"):
            fastsal.cat([exact, fastsal.analyze(torch.nn.Linear(7, 4), x)])
        bare = dataclasses.replace(exact, distances=None)
        with pytest.raises(ValueError, match="got method 'exact', 'candidates', wants the same in all"):
            fastsal.cat([bare, fastsal.analyze(model, x, method="candidates")])

    def test_the_largest_failure_probability_is_that_of_all(self, model, x):
        parts = [fastsal.analyze(model, x, method=fastsal.Certified(p)) for p in (1e-9, 1e-3, 1e-6)]
        assert fastsal.cat(parts).failure_probability == 1e-3


class TestEquality:
    def test_answers(self, results):
        assert results == pickle.loads(pickle.dumps(results))
        assert results == dataclasses.replace(results)
        assert (results != results[:-1], results == 3, results != None) == (True, False, True)  # noqa: E711

    @pytest.mark.parametrize("name", ["prediction", "linearized_robustness", "certified", "method", "distances"])
    def test_every_field_counts(self, model, x, name):
        one = fastsal.analyze(model, x)
        value = getattr(one, name)
        if isinstance(value, torch.Tensor):
            changed = value.clone()
            changed.view(-1)[-1] = False if value.dtype == torch.bool else changed.view(-1)[-1] + 1
            assert one != dataclasses.replace(one, **{name: value.double()})
        else:
            changed = "other"
        assert one != dataclasses.replace(one, **{name: changed})
        if name == "distances":
            assert one != dataclasses.replace(one, distances=None)

    def test_is_not_hashable(self, results):
        with pytest.raises(TypeError, match="unhashable"):
            hash(results)


class TestFile:
    def test_comes_back(self, results, tmp_path):
        for part in (results, results[1:3], results[4], results[:0]):
            part.save(tmp_path / "r.pt")
            assert fastsal.load(tmp_path / "r.pt") == part
            assert fastsal.load(str(tmp_path / "r.pt")) == part
        assert [path.name for path in tmp_path.iterdir()] == ["r.pt"]

    def test_is_what_torch_reads_without_unpickling(self, results, tmp_path):
        results.save(tmp_path / "r.pt")
        found = torch.load(tmp_path / "r.pt", weights_only=True)
        assert found.pop("fastsal") == type(results).__name__
        assert list(found) == [field.name for field in dataclasses.fields(results)]
        assert {name for name, value in found.items() if isinstance(value, torch.Tensor)} == set(tensors(results))

    def test_a_part_takes_the_room_of_a_part(self, tmp_path):
        pairs = fastsal.pairwise_margins(torch.randn(50, 30), torch.randn(50, 30, 4))
        pairs.save(tmp_path / "whole")
        pairs[3].save(tmp_path / "part")
        assert (tmp_path / "part").stat().st_size < (tmp_path / "whole").stat().st_size / 10

    def test_gradients_stay_behind(self, model, x, tmp_path):
        found = fastsal.analyze(model, x, differentiable=True)
        found.save(tmp_path / "r.pt")
        assert fastsal.load(tmp_path / "r.pt") == found
        assert not fastsal.load(tmp_path / "r.pt").alignment.requires_grad

    @pytest.mark.parametrize("content", ["index,method\n", "pickle", "dict", "other"])
    def test_what_is_no_result(self, tmp_path, content):
        path = tmp_path / "r.csv"
        if content == "pickle":
            path.write_bytes(pickle.dumps(Unpickled()))
        elif content in ("dict", "other"):
            torch.save({"fastsal": "Geometry"} if content == "dict" else torch.zeros(3), path)
        else:
            path.write_text(content)
        with pytest.raises(ValueError, match=r"results: .*r\.csv is no file that `save` of a result wrote") as caught:
            fastsal.load(path)
        assert "weights_only" not in str(caught.value)
        with pytest.raises(FileNotFoundError):
            fastsal.load(tmp_path / "nowhere")


class Unpickled:
    """Fails a test when it is made from a file."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


class TestTable:
    @pytest.fixture(autouse=True)
    def _pandas(self):
        pytest.importorskip("pandas")

    def test_rows(self, results):
        frame = results.to_pandas()
        pairs = isinstance(results, fastsal.PairwiseMargins)
        assert list(frame.index.names) == (["example", "class", "other"] if pairs else ["example"])
        assert len(frame) == (B * 25 if pairs else B)
        columns = {name: value for name, value in tensors(results).items() if value.dim() == (3 if pairs else 1)}
        about = {name for name, value in vars(results).items() if isinstance(value, str | float)}
        assert set(frame) == {*columns, *about}
        for name, value in columns.items():
            np.testing.assert_array_equal(frame[name].to_numpy(), value.flatten().numpy())
            assert frame[name].dtype == value.numpy().dtype

    def test_one_example(self, results):
        assert results[2].to_pandas().equals(results[2:3].to_pandas())

    def test_with_gradients(self, model, x):
        frame = fastsal.analyze(model, x, differentiable=True).to_pandas()
        assert len(frame) == B


class TestPrint:
    def test_is_short(self, results):
        for part in (results, results[0], results[:0], results[:1]):
            text = repr(part)
            assert text.startswith(f"{type(results).__name__} of ")
            assert len(text.splitlines()) <= 13
            assert max(map(len, text.splitlines())) <= 100
            for name in vars(part):
                assert name in text, name

    def test_numbers(self, model, x):
        found = fastsal.analyze(model, x)
        (line,) = (line for line in repr(found).splitlines() if "linearized_robustness" in line)
        rho = found.linearized_robustness.sort().values
        assert line.split()[1:] == [f"{value:.6g}" for value in (rho[0], rho[2], rho[-1])]
        assert repr(found[3]).count(f"linearized_robustness {found.linearized_robustness[3]:.6g},") == 1
        x[1] = torch.nan
        assert "(1 NaN left out)" in repr(fastsal.analyze(model, x))

    def test_size_does_not_matter(self):
        found = fastsal.margin_geometry(torch.randn(450, 10), torch.randn(450, 10, 8), torch.randn(450, 8))
        assert len(repr(found)) < 1000


class TestMove:
    def test_to_a_device(self, results):
        moved = results.to("meta")
        assert {value.device.type for value in tensors(moved).values()} == {"meta"}
        assert results.cpu() == results.to(torch.device("cpu")) == results


class TestDistances:
    def test_of_a_certified_result_explain_themselves(self, model, x):
        for method in ("certified", "candidates"):
            found = fastsal.analyze(model, x, method=method)
            with pytest.warns(UserWarning, match=rf"distances: None, since method='{method}' .*method='exact'"):
                assert found.distances is None
            with pytest.warns(UserWarning, match="distances: None"):
                assert found[2].distances is None
        with pytest.warns(UserWarning, match="since they were not kept"):
            assert dataclasses.replace(fastsal.analyze(model, x), distances=None).distances is None

    def test_of_an_exact_one_do_not(self, model, x):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = fastsal.analyze(model, x)
            assert found.distances.shape == (B, 5)
            certified = fastsal.analyze(model, x, method="certified", keep_saliency=True)
            assert certified.saliency is not None
            repr(certified), certified.to_pandas(), certified[1:] == certified, certified.cpu()
            assert not hasattr(certified, "distance")
