"""The command line: tables in, flows in files, tables and figures out, errors in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import pyroflow as pf
from pyroflow import cli

SHORT = ("--steps", "5", "--polish", "0", "--layers", "2")
SUPPORT = ("--support", "bmi=positive", "--support", "share=0,1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None) -> Path:
    """A folder to be in, with a table."""
    monkeypatch.chdir(tmp_path)
    data().to_csv("t.csv", index=False)
    return tmp_path


def data(n: int = 200) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"bmi": rng.lognormal(3, 0.2, n), "share": rng.beta(2, 3, n)})


@pytest.fixture
def flow() -> pf.Flow:
    """What is in f.pt."""
    return fitted()[0]


def fitted() -> tuple[pf.Flow, Any]:
    flow = pf.planar_flow(2, num_layers=2, support={"bmi": "positive", "share": (0, 1)})
    fit = pf.fit_density(flow, data(), steps=5, polish=0, seed=0, progress=False)
    pf.save(flow, "f.pt")
    return flow, fit


def invoke(*arguments: str, code: int = 0, **options: Any) -> Any:
    """The result of a call that ends with a code; errors take one line of standard error."""
    result = CliRunner().invoke(cli.app, arguments, **options)
    assert result.exit_code == code, result.output
    if code:
        assert result.stdout == ""
        assert re.fullmatch(r"pyroflow: error: .*\n", result.stderr), result.stderr
    return result


def numbers(text: str) -> np.ndarray:
    return np.loadtxt(text.splitlines(), delimiter=",", skiprows=1, ndmin=2)


def test_fit_is_fit_density() -> None:
    flow, fit = fitted()
    result = invoke("fit", "t.csv", "--out", "g.pt", *SHORT, *SUPPORT, "--json")
    report, read = json.loads(result.stdout), pf.load("g.pt")
    assert read.columns == ("bmi", "share")
    assert torch.equal(read.log_prob(data()), flow.log_prob(data()))
    assert report["held_out_nats"] == fit.best_loss
    assert report["stopped"] == "all 5 steps done"
    assert (report["rows"], report["columns"]) == (200, ["bmi", "share"])
    text = invoke("fit", "t.csv", "--out", "h.pt", *SHORT, *SUPPORT).stdout
    assert f"held-out mean of -log density: {report['held_out_nats']:.4f} nats" in text
    assert "stopped after 5 steps" in text
    assert invoke("fit", "t.csv", "--out", "i.pt", *SHORT, *SUPPORT, "--quiet").output == ""


@pytest.mark.filterwarnings("default")  # it is shown as a line of its own
@pytest.mark.parametrize(
    ("kind", "made"), [("radial", pf.Radial), ("sylvester", pf.Sylvester)], ids=str
)
def test_kinds_and_columns(kind: str, made: type) -> None:
    frame = data().assign(name="x", other=np.arange(200.0))[["name", "other", "bmi", "share"]]
    frame.to_csv("wide.csv", index=False, sep=";", decimal=",")
    invoke("fit", "wide.csv", "--out", "f.pt", *SHORT, "--kind", kind, "--columns", "share, other")
    flow = pf.load("f.pt")
    assert flow.columns == ("share", "other")
    assert isinstance(flow.steps[0][0], made)
    result = invoke("score", "f.pt", "wide.csv")
    assert "warning: wide.csv: columns 'name', 'bmi' are not the flow's" in result.stderr
    assert np.allclose(numbers(result.stdout)[:, 0], flow.log_prob(frame[["share", "other"]]))


def test_a_table_without_names() -> None:
    values = np.random.default_rng(0).normal(size=(200, 3))
    np.save("t.npy", values)
    np.savetxt("bare.csv", values, delimiter=",")
    options = (*SHORT, "--columns", "2,0", "--support", "0=-inf,99", "--double", "--tails")
    invoke("fit", "t.npy", "--out", "f.pt", *options)
    text = Path("bare.csv").read_text()
    invoke("fit", "-", "--out", "g.pt", *options, input=text)
    flow = pf.load("f.pt")
    assert flow.columns is None
    assert flow.outer_support.bounds[0] == (-np.inf, 99.0)
    expected = flow.log_prob(values[:, [2, 0]])
    assert torch.equal(pf.load("g.pt").log_prob(values[:, [2, 0]]), expected)
    found = invoke("score", "f.pt", "-", "--columns", "2,0", "--json", "--quiet", input=text)
    report = json.loads(found.stdout)
    assert report["log_prob"] == expected.tolist()
    assert report["mean_log_prob"] == pytest.approx(expected.mean().item())
    drawn = invoke("sample", "f.pt", "-n", "5", "--seed", "1").stdout
    assert len(drawn.splitlines()) == 5
    invoke("plot", "f.pt", "bare.csv", "--columns", "2,0", "--out", "f.svg")
    assert "<svg" in Path("f.svg").read_text()


def test_sample_writes_tables(flow: pf.Flow) -> None:
    expected = flow.sample(7, seed=3)
    draw = ("sample", "f.pt", "-n", "7", "--seed", "3")
    result = invoke(*draw)
    assert result.stdout.startswith("bmi,share\n")
    assert np.array_equal(numbers(result.stdout).astype(np.float32), expected)
    invoke(*draw, "--out", "d.npy")
    assert np.array_equal(np.load("d.npy"), expected)
    invoke(*draw, "--out", "d.csv", "--delimiter", ";", "--decimal", ",")
    assert np.array_equal(pf.datasets.read_table("d.csv").numpy(), expected)
    report = json.loads(invoke(*draw, "--json").stdout)
    assert report["columns"] == ["bmi", "share"]
    assert np.array_equal(np.float32(report["draws"]), expected)
    before = Path("d.npy").read_bytes()
    assert "give --force" in invoke(*draw, "--out", "d.npy", code=2).stderr
    assert Path("d.npy").read_bytes() == before
    report = json.loads(invoke(*draw, "-n", "8", "--out", "d.npy", "--force", "--json").stdout)
    assert (report["rows"], report["file"], len(np.load("d.npy"))) == (8, "d.npy", 8)
    engine = any(find_spec(name) for name in ("pyarrow", "fastparquet"))
    result = invoke(*draw, "--out", "d.parquet", code=0 if engine else 1)
    assert Path("d.parquet").exists() == engine
    assert engine or "pyarrow" in result.stderr


def test_a_fit_goes_on_from_its_checkpoint() -> None:
    whole = ("fit", "t.csv", *SHORT, "--json")
    first = json.loads(invoke(*whole, "--out", "a.pt", "--checkpoint", "c").stdout)
    assert (
        "go on from it with --resume"
        in invoke(*whole, "--out", "b.pt", "--checkpoint", "c", code=2).stderr
    )
    second = json.loads(invoke(*whole, "--out", "b.pt", "--resume", "c").stdout)
    assert second["held_out_nats"] == first["held_out_nats"]
    invoke(*whole, "--out", "d.pt", "--resume", "c", "--seed", "1", code=1)
    assert not Path("d.pt").exists()


def test_plot(flow: pf.Flow) -> None:
    invoke("plot", "f.pt", "t.csv", "--out", "f.png")
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")
    data().assign(z=np.linspace(0, 1, 200) ** 2).to_csv("three.csv", index=False)
    invoke("fit", "three.csv", "--out", "g.pt", *SHORT)
    report = json.loads(invoke("plot", "g.pt", "three.csv", "--out", "g.png", "--json").stdout)
    columns = ["bmi", "share", "z"]
    assert report == {"file": "g.png", "rows": 200, "samples": 10_000, "columns": columns}
    assert Path("g.png").read_bytes().startswith(b"\x89PNG")
    some = ("--columns", "z,bmi", "--out", "h.png")
    told = "h.png: 200 rows beside 10000 samples, columns z, bmi\n"
    assert invoke("plot", "g.pt", "three.csv", *some).stdout == told
    assert (
        "--out must end in one of .png"
        in invoke("plot", "g.pt", "three.csv", "--out", "g.csv", code=2).stderr
    )


def test_info(flow: pf.Flow) -> None:
    report = json.loads(invoke("info", "f.pt", "--json").stdout)
    assert report["columns"] == ["bmi", "share"]
    assert report["support"] == [[0.0, None], [0.0, 1.0]]
    assert report["layers"][0]["arguments"]["num_layers"] == 2
    assert report["parameters"] == sum(p.numel() for p in flow.parameters())
    assert report["fitted"] is True
    text = invoke("info", "f.pt").stdout
    assert "support: (0, inf), (0, 1)\n" in text
    assert "layers: Planar(input_dim=2, num_layers=2, " in text
    assert f"written by: pyroflow {pf.__version__}\n" in text

    def model() -> None:
        with pyro.plate("groups", 3):
            pyro.sample("theta", dist.Normal(0.0, 1.0))

    guide = pf.AutoPlanarFlow(model)
    guide()
    pf.save(guide, "guide.pt")
    report = json.loads(invoke("info", "guide.pt", "--json").stdout)
    assert (report["kind"], report["class"]) == ("guide", "AutoPlanarFlow")
    assert report["sites"] == {"theta": [3]}
    assert "sites: theta [3]\n" in invoke("info", "guide.pt").stdout
    assert "holds a guide, AutoPlanarFlow" in invoke("sample", "guide.pt", code=1).stderr


@pytest.mark.parametrize(
    ("table", "options", "code", "message"),
    [
        ("a,b\n1,nan\n2,3\nNA,4\n", (), 1, r"missing values in column 'a' \(1, the first in row 2"),
        ("a,b,c\n1,x,u\n2,y,v\n", (), 1, r"column 1 \('b'\).*likewise in columns \['c'\]"),
        ("a,b\n1,2\n3,4\n5,9\n", ("--columns", "a,z"), 2, "no 'z'; its columns are 'a', 'b'"),
        ("1,2\n3,4\n", ("--columns", "a"), 2, "--columns expects positions from 0"),
        ("a,b\n1,2\n3,4\n", ("--support", "c=0,1"), 2, "support names the columns 'c'"),
        ("a,b\n1,2\n3,4\n", ("--support", "a=1,0"), 2, "low < high for column 'a'"),
        ("a,b\n1,2\n3,4\n", ("--support", "a"), 2, "--support expects a column's name"),
        ("1,2\n3,4\n", ("--support", "a=0,1"), 2, "a column's position from 0"),
        ("a,b\n1,2\n3,4\n", ("--support", "a=0,9", "--support", "a=0,8"), 2, "a column twice"),
        ("a,b\n1,2\n3,5\n", ("--support", "b=0,5"), 1, "got 5 in row 1, column 'b'"),
        ("a,b\n1,2\n3,5\n", ("--units", "2"), 2, "num_units is of Sylvester flows, got 2"),
        ("a,b\n1,2\n3,5\n", ("--device", "warp"), 1, "device must be a device of torch"),
        ("a,b\n1,2\n3,5\n", ("--resume", "nowhere"), 2, "there is no file nowhere"),
        ("a,b\n1,2\n1,5\n", (), 1, r"constant column\(s\) \['a'\]"),
    ],
)
def test_refusals(table: str, options: tuple[str, ...], code: int, message: str) -> None:
    result = invoke("fit", "-", "--out", "f.pt", *SHORT, *options, code=code, input=table)
    assert re.search(message, result.stderr), result.stderr
    assert not Path("f.pt").exists()


def test_files_that_are_not_there(flow: pf.Flow) -> None:
    assert "there is no file x.csv" in invoke("score", "f.pt", "x.csv", code=1).stderr
    data().rename(columns={"bmi": "BMI"}).to_csv("u.csv", index=False)
    assert "u.csv has no column 'bmi', which" in invoke("score", "f.pt", "u.csv", code=1).stderr
    assert "path x.pt does not exist" in invoke("sample", "x.pt", code=1).stderr
    assert "not a file of pyroflow.save" in invoke("info", "t.csv", code=1).stderr
    assert "folder that does not exist" in invoke("fit", "t.csv", "--out", "no/f.pt", code=2).stderr
    assert CliRunner().invoke(cli.app, ["sample"]).exit_code == 2
    assert invoke("--version").stdout == f"pyroflow {pf.__version__}\n"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from pyroflow import cli;"
        "result = CliRunner().invoke(cli.app, ['fit', '--help']);"
        "sys.exit(result.exit_code or 'torch' in sys.modules or 'pandas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
def test_a_broken_pipe_ends_quietly(flow: pf.Flow) -> None:
    call = [sys.executable, "-m", "pyroflow", "sample", "f.pt", "-n", "100000"]
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"bmi,share\n"
        process.stdout.close()
        assert process.stderr.read() == b""
