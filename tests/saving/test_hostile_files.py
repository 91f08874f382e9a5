"""Files with a flipped bit, and small files that claim much: refused, and without the memory."""

from __future__ import annotations

import pickle
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor

import pyroflow as pf
from pyroflow.flows import StandardNormal
from pyroflow.io import read_data

MUCH = 10**9  # numbers: 4 to 8 GB
POINTS = torch.linspace(-2, 2, 10).reshape(5, 2)


@contextmanager
def little_memory() -> Iterator[None]:
    """No more than half a gigabyte beyond what is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + 2**29
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refused(path: Path, read: Callable[[Path], Any] = pf.load) -> str:
    """Why a file is refused, which is not that the memory was not enough for it."""
    assert path.stat().st_size < 200_000
    with little_memory(), pytest.raises(ValueError, match=path.name) as error:
        read(path)
    assert "allocate" not in str(error.value)
    return str(error.value)


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, torch_load = tmp_path / "flow.pt", 0
    pf.save(pf.planar_flow(2, 2), path)
    content = path.read_bytes()
    with torch.no_grad():
        expected = pf.load(path)().log_prob(POINTS.double())
    for bit in range(5, 8 * len(content), 41):
        path.write_bytes(flipped(content, bit))
        try:
            flow = pf.load(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            torch_load += _reads(path)
            continue
        with torch.no_grad():
            assert torch.equal(flow().log_prob(POINTS.double()), expected), bit
    assert torch_load > 20  # so torch's own reader would have taken the damage


def _reads(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def test_a_flipped_bit_in_a_checkpoint_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    options = {"steps": 3, "polish": 0, "seed": 0, "progress": False, "checkpoint": path}
    data = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    whole = pf.fit_density(pf.planar_flow(2, 1), data, **options)
    content, count = path.read_bytes(), 0
    for bit in range(3, 8 * len(content), 8 * 211 + 3):
        path.write_bytes(flipped(content, bit))
        try:
            found = pf.fit_density(pf.planar_flow(2, 1), data, **options)
        except ValueError as error:
            assert "fit.pt is not a checkpoint" in str(error)  # noqa: PT017
            count += 1
        else:
            assert found.losses == whole.losses
    assert count > 10


def edited(tmp_path: Path, saved: object, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The file of an object after an edit of its content."""
    path = tmp_path / "edited.pt"
    pf.save(saved, path)
    content = read_data(path)
    edit(content["content"])
    torch.save(content, path)
    return path


def arguments(content: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return content["parts"]["arguments"]["transforms"][index]["arguments"]


def ours(transform: Any) -> pf.Flow:
    return pf.Flow(StandardNormal(2), [transform])


CLAIMS: dict[str, tuple[Callable[[], pf.Flow], Callable[[dict[str, Any]], object]]] = {
    "layers": (lambda: pf.planar_flow(2, 2), lambda c: arguments(c).update(num_layers=MUCH)),
    "radial layers": (
        lambda: pf.radial_flow(2, 2), lambda c: arguments(c).update(num_layers=MUCH)
    ),
    "fixed frames": (
        lambda: ours(pf.Sylvester(2, 1, 2, "triangular")),
        lambda c: arguments(c).update(num_layers=MUCH),
    ),
    "width": (
        lambda: ours(pf.Affine(2)), lambda c: arguments(c).update(input_dim=40_000)
    ),
    "base": (
        lambda: pf.planar_flow(2, 2),
        lambda c: c["parts"]["arguments"]["base"]["arguments"].update(input_dim=MUCH),
    ),
    "hidden units": (
        lambda: pf.planar_flow(2, 2, context_dim=1),
        lambda c: arguments(c).update(hidden_dims=[40_000, 40_000]),
    ),
    "context": (
        lambda: pf.planar_flow(2, 2, context_dim=1),
        lambda c: arguments(c).update(context_dim=MUCH),
    ),
    "masks": (
        lambda: ours(pyro_transforms.AffineAutoregressive(AutoRegressiveNN(2, [4]))),
        lambda c: arguments(c)["autoregressive_nn"]["arguments"].update(hidden_dims=[9999, 99999]),
    ),
    "dense": (
        lambda: ours(pyro_transforms.AffineCoupling(1, DenseNN(1, [4]))),
        lambda c: arguments(c)["hypernet"]["arguments"].update(hidden_dims=[40_000, 40_000]),
    ),
    "bins": (
        lambda: ours(pyro_transforms.Spline(2)), lambda c: arguments(c).update(count_bins=MUCH)
    ),
    "reflections": (
        lambda: ours(pyro_transforms.Householder(2)),
        lambda c: arguments(c).update(input_dim=40_000, count_transforms=40_000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_sizes_that_the_tensors_do_not_bear_out_are_refused(claim: str, tmp_path: Path) -> None:
    make, edit = CLAIMS[claim]
    assert "far beyond the" in refused(edited(tmp_path, make(), edit))


def test_many_modest_claims_together_are_refused(tmp_path: Path) -> None:
    """Each below what is spared, a thousand of them 80 MB."""

    def more(content: dict[str, Any]) -> None:
        given = content["parts"]["arguments"]
        layer = {"kind": "pyroflow.Planar", "arguments": dict(arguments(content), num_layers=2000)}
        given["transforms"] = [layer] + [dict(layer) for _ in range(999)]

    assert "far beyond the" in refused(edited(tmp_path, pf.planar_flow(2, 2), more))


def model() -> None:
    with pyro.plate("rows", 3):
        pyro.sample("z", dist.HalfNormal(torch.ones(3)))


def guide() -> pf.AutoPlanarFlow:
    return pf.AutoPlanarFlow(model, 2).setup()


def site(content: dict[str, Any]) -> dict[str, Any]:
    return content["sites"][0]


GUIDES: dict[str, Callable[[dict[str, Any]], object]] = {
    "latents": lambda c: site(c).update(unconstrained_shape=[MUCH], batch_shape=[MUCH]),
    "negative": lambda c: site(c).update(unconstrained_shape=[-3], batch_shape=[-3]),
    "batch": lambda c: site(c).update(batch_shape=[MUCH, 3]),
    "event": lambda c: site(c).update(event_shape=[MUCH]),
    "plate": lambda c: site(c)["plates"][0].update(size=MUCH, full_size=MUCH),
    "subsampled plate": lambda c: site(c)["plates"][0].update(full_size=10**12),
    "plate without a dim": lambda c: site(c)["plates"][0].update(dim=None),
    "support": lambda c: site(c).update(
        support={"kind": "support.greater_than", "arguments": {"lower_bound": torch.zeros(9, 1)}}
    ),
    "layers": lambda c: c["options"].update(num_layers=MUCH),
    "one name twice": lambda c: c["sites"].append(
        dict(site(c), unconstrained_shape=[0], batch_shape=[0], plates=[])
    ),
}


@pytest.mark.parametrize("claim", GUIDES)
def test_claims_of_a_guide_are_refused(claim: str, tmp_path: Path) -> None:
    refused(edited(tmp_path, guide(), GUIDES[claim]))


def test_switches_set_nothing_else(tmp_path: Path) -> None:
    path = edited(tmp_path, guide(), lambda c: c["switches"].update(forward=1, grows=True))
    loaded = pf.load(path)
    assert loaded.grows
    assert loaded.forward != 1


def zipped(path: Path, pickled: bytes, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", bytes(64))
    return path


def shaped(size: tuple, stride: tuple, count: int = 8, storage: str = "DoubleStorage") -> bytes:
    """A pickle, in text, of a tensor on a part with eight float64."""
    numbers = ("(" + "".join(f"I{n}\n" for n in numbers) + "t" for numbers in (size, stride))
    text = f"ctorch._utils\n_rebuild_tensor_v2\n((Vstorage\nctorch\n{storage}\nV0\nVcpu\n"
    text += f"I{count}\ntQI0\n{''.join(numbers)}I00\nccollections\nOrderedDict\n(tRtR."
    return text.encode()


def test_views_that_are_larger_than_what_they_show_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "views.pt"
    assert torch.equal(read_data(zipped(path, shaped((2, 4), (4, 1)))), torch.zeros(2, 4).double())
    claims = {"expanded": ((MUCH,), (0,)), "outside": ((9,), (1,)), "far": ((2,), (MUCH,))}
    claims |= {"overflow": ((2**33, 2**33), (0, 0)), "negative": ((-1, -9), (1, 1))}
    for size, stride in claims.values():
        refused(zipped(path, shaped(size, stride)), read_data)
    many = b"(" + 100 * shaped((8,), (1,))[:-1] + b"l."
    assert "claim more than the file" in refused(zipped(path, many), read_data)


def test_quantized_numbers_are_refused(tmp_path: Path) -> None:
    """Torch crashes where it makes a tensor of them."""
    path = zipped(tmp_path / "quantized.pt", shaped((2, 4), (4, 1), storage="QInt8Storage"))
    assert "it asks for torch.QInt8Storage, which no tensor needs" in refused(path, read_data)


def test_a_claim_of_a_part_to_be_longer_is_not_believed(tmp_path: Path) -> None:
    """torch takes the size of a part from the pickle, and reads beyond its end."""
    path = zipped(tmp_path / "long.pt", shaped((8,), (1,), count=MUCH))
    assert len(read_data(path)) == 8
    refused(zipped(path, shaped((MUCH,), (1,), count=MUCH)), read_data)


def test_compressed_parts_and_repeated_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(10**8))
    assert "claim more than the file holds" in refused(path, read_data)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(1, 2))
        archive.writestr("y/data.pkl", pickle.dumps(2, 2))
    assert "two parts have one name" in refused(path, read_data)


LAUGHS = b"\x80\x02]q\x00"  # each list holds the one before nine times
LAUGHS += b"".join(b"]q%c(%se" % (i, b"h%c" % (i - 1) * 9) for i in range(1, 15)) + b"."


@pytest.mark.parametrize(
    "pickled",
    [
        b"K\x01r\xff\xff\xff\x7f.",  # a memo of 2 billion entries
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",  # a bytearray of a terabyte
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        LAUGHS,
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    ],
    ids=["memo", "bytearray", "call", "laughs", "itself"],
)  # fmt: skip
def test_pickles_that_want_much_are_refused(pickled: bytes, tmp_path: Path) -> None:
    path = zipped(tmp_path / "pickle.pt", pickled)
    if pickled[:2] == b"K\x01":
        with little_memory():
            assert read_data(path) == 1
        return
    refused(path, read_data)


def test_all_types_of_numbers_come_back(tmp_path: Path) -> None:
    numbers = torch.arange(6).reshape(2, 3)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    kinds += (torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    data: dict[str, Tensor] = {str(kind): numbers.to(kind) for kind in (*kinds, torch.bool)}
    data |= {"turned": numbers.T.clone(), "part": numbers.clone()[:, 1:], "none": torch.empty(0, 3)}
    torch.save(data, tmp_path / "all.pt")
    found = read_data(tmp_path / "all.pt")
    assert data.keys() == found.keys()
    for name, value in data.items():
        assert value.dtype == found[name].dtype
        assert torch.equal(value, found[name]), name
