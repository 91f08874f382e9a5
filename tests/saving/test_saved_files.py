"""Files that are not there, not whole, not ours, or hostile."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflow as pf


class Hostile:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def zipped(target: Path) -> bytes:
    """A file as torch writes them, with hostile content where ours would be."""
    buffer = io.BytesIO()
    content = {"kind": "flow", "format": 1, "pyroflow": "1", "content": Hostile(target)}
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_hostile_pickle_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    target, path = tmp_path / "touched", tmp_path / "flow.pt"
    path.write_bytes(pickle.dumps(Hostile(target)) if form == "pickle" else zipped(target))
    with pytest.raises(ValueError, match="not a file of pyroflow.save; nothing in it was run"):
        pf.load(path)
    assert not target.exists()
    pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False)
    assert target.exists()  # so the file was hostile


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", "text")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", bytes(range(256)), archive(), pickle.dumps([1, 2])]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "flow.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"flow.pt is not a file of pyroflow.save"):
        pf.load(tmp_path / "flow.pt")


def test_a_state_dict_is_not_a_file_of_save(tmp_path: Path) -> None:
    torch.save(pf.planar_flow(2).state_dict(), tmp_path / "flow.pt")
    with pytest.raises(ValueError, match=r"flow.pt is not a file of pyroflow.save"):
        pf.load(tmp_path / "flow.pt")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path .*none.pt does not exist"):
        pf.load(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="in a folder that does not exist"):
        pf.save(pf.planar_flow(2), tmp_path / "none" / "flow.pt")


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The file of a flow after an edit of its content."""
    pf.save(pf.planar_flow(2), path)
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("form", ["flow", "guide"])
def test_sylvester_layers_of_format_1_are_refused(form: str, tmp_path: Path) -> None:
    """Their parameters would be another density; planar ones mean what they meant."""

    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))

    def first(saved: object, name: str) -> Path:
        path = tmp_path / name
        pf.save(saved, path)
        content = torch.load(path, weights_only=True)
        torch.save(content | {"format": 1}, path)
        return path

    makers = {
        "flow": (lambda: pf.sylvester_flow(2, num_units=2), lambda: pf.planar_flow(2)),
        "guide": (lambda: pf.AutoSylvesterFlow(model), lambda: pf.AutoPlanarFlow(model)),
    }
    ours, other = (make() for make in makers[form])
    if form == "guide":
        ours.setup()
        other.setup()
    with pytest.raises(ValueError, match=r"Sylvester layers in format 1.*fit anew"):
        pf.load(first(ours, "sylvester.pt"))
    assert pf.load(first(other, "planar.pt")) is not None


def test_a_later_format_says_what_to_install(tmp_path: Path) -> None:
    path = edited(tmp_path / "flow.pt", lambda c: c.update(format=99, pyroflow="9.8"))
    with pytest.raises(ValueError, match=r"format 99, written by pyroflow 9\.8.*install"):
        pf.load(path)


DAMAGE = {
    "unknown transform": lambda c: c["content"]["parts"].update(kind="os.system"),
    "another size": lambda c: c["content"]["state"].update({"parts.0.w": torch.zeros(16, 3)}),
    "a tensor less": lambda c: c["content"]["state"].pop("parts.0.w"),
    "another argument": lambda c: c["content"]["parts"]["arguments"].update(code="1"),
    "no content": lambda c: c.pop("content"),
    "no parts": lambda c: c["content"].pop("parts"),
    "impossible": lambda c: c["content"]["parts"]["arguments"].update(order=[7]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_as_such(damage: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"flow.pt is a damaged file of pyroflow"):
        pf.load(edited(tmp_path / "flow.pt", DAMAGE[damage]))


def test_the_file_names_no_code_but_that_of_tensors(tmp_path: Path) -> None:
    pf.save(pf.planar_flow(2, 3), tmp_path / "flow.pt")
    with zipfile.ZipFile(tmp_path / "flow.pt") as file:
        name = next(name for name in file.namelist() if name.endswith("data.pkl"))
        codes = pickletools.genops(file.read(name))
    named = {argument for code, argument, _ in codes if code.name in ("GLOBAL", "STACK_GLOBAL")}
    rebuilding = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
    assert named == rebuilding | {"torch DoubleStorage"}


def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flow = tmp_path / "flow.pt", pf.planar_flow(2, 3)
    pf.save(flow, path)
    before = path.read_bytes()

    def fails(file: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fails)  # when all is written
    with pytest.raises(OSError, match="no space left"):
        pf.save(pf.radial_flow(5), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_is_not_for_flows(tmp_path: Path) -> None:
    pf.save(pf.planar_flow(2), tmp_path / "flow.pt")
    with pytest.raises(TypeError, match="holds a flow, which takes no model"):
        pf.load(tmp_path / "flow.pt", model=lambda: None)
    with pytest.raises(TypeError, match="model must be callable, got int"):
        pf.load(tmp_path / "flow.pt", model=1)


def test_what_is_in_the_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder cannot be read \(.*\): name a file"):
        pf.load(tmp_path / "folder")
    with pytest.raises(OSError, match="folder is not a file: name one to write to"):
        pf.save(pf.planar_flow(2), tmp_path / "folder")
    assert not any((tmp_path / "folder").iterdir())
    pf.save(pf.planar_flow(2), tmp_path / "flow.pt")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "flow.pt")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError, match=r"flow.pt cannot be read \(Permission denied\)"):
        pf.load(tmp_path / "flow.pt")


def test_a_checkpoint_is_told_from_a_saved_flow(tmp_path: Path) -> None:
    flow, data = pf.planar_flow(2, 1), torch.randn(50, 2)
    options = {"steps": 1, "polish": 0, "seed": 0, "progress": False}
    pf.fit_density(flow, data, checkpoint=tmp_path / "fit.pt", **options)
    pf.save(flow, tmp_path / "flow.pt")
    with pytest.raises(ValueError, match=r"fit.pt is not a file of .*checkpoint goes to the fit_"):
        pf.load(tmp_path / "fit.pt")
    with pytest.raises(ValueError, match=r"flow.pt is not a checkpoint of a fit"):
        pf.fit_density(flow, data, checkpoint=tmp_path / "flow.pt", **options)


def test_a_replaced_file_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    path, link = tmp_path / "flow.pt", tmp_path / "link.pt"
    pf.save(pf.planar_flow(2, 1), path)
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert path.stat().st_mode == fresh.stat().st_mode
    path.chmod(0o640)
    link.symlink_to(path)
    pf.save(pf.planar_flow(2, 5), link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(pf.load(path).parts[0].w) == 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_no_fault_of_the_file(tmp_path: Path) -> None:
    pf.save(pf.planar_flow(2), tmp_path / "flow.pt")
    with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
        pf.load(tmp_path / "flow.pt", device="cuda")
