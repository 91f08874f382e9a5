"""A guide's entries in Pyro's parameter store: under names of its own, and gone with the guide."""

import copy
import gc
import pickle
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import Y, rows_model
from cases import slow
from drop_in_cases import GUIDES
from pyro.distributions.transforms import GeneralizedChannelPermute, ReshapeTransform
from pyro.infer import SVI, Trace_ELBO
from pyro.params.param_store import ParamStoreDict
from torch import Tensor, nn

import pyroflow as pf


def pair() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


MAKES = {name: (lambda make=make: make(pair), ()) for name, make in GUIDES.items()}
MAKES["rows"] = (lambda: pf.AmortizedPlanarGuide(rows_model, "rows", "y", num_layers=2), (Y,))
MAKES["table"] = (lambda: pf.AmortizedPlanarGuide(rows_model, "rows", num_layers=2), (Y,))


# One of each class; what the store has of a guide is put there by what they share.
@pytest.fixture(params=[name if name in ("planar", "rows") else slow(name) for name in MAKES])
def case(request: pytest.FixtureRequest) -> tuple[Callable, tuple]:
    return MAKES[request.param]


def keys() -> set[str]:
    gc.collect()
    return set(pyro.get_param_store())


def fold(make: Callable, args: tuple) -> int:
    """A guide that is trained for one step and dropped; the entries that it had."""
    before, guide = keys(), make().setup(*args)
    svi = SVI(guide.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*args)
    return len(keys() - before)


def test_guides_of_a_loop_leave_nothing_behind(case: tuple[Callable, tuple]) -> None:
    pyro.param("mine", torch.tensor(1.0))
    counts = [fold(*case) for _ in range(3)]
    assert counts[0] > 0
    assert counts == counts[:1] * 3
    assert keys() == {"mine"}


def test_what_others_have_put_there_stays(case: tuple[Callable, tuple]) -> None:
    make, args = case
    first, second = make(), make()
    first(*args), second(*args)
    other, pickled = copy.deepcopy(first), pickle.loads(pickle.dumps(first))
    other(*args), pickled(*args)
    names = {guide._pyro_name for guide in (first, second, other, pickled)}
    assert len(names) == 4
    theirs = {key for key in keys() if not key.startswith(f"{first._pyro_name}.")}
    replaced = next(iter(keys() - theirs))
    pyro.get_param_store()[replaced] = torch.tensor(1.0)  # by the user
    del first
    assert keys() == theirs | {replaced}
    del second, other
    assert all(key.startswith((f"{pickled._pyro_name}.", replaced)) for key in keys())
    del pickled
    assert keys() == {replaced}


def test_a_cleared_store_is_no_harm(case: tuple[Callable, tuple]) -> None:
    make, args = case
    first = make()
    first(*args)
    pyro.clear_param_store()
    second = make()
    second(*args)  # under the name that the first had
    assert second._pyro_name == first._pyro_name
    there = keys()
    del first
    assert keys() == there
    del second
    assert keys() == set()


def test_layers_that_are_added_leave_with_the_guide() -> None:
    guide = pf.AutoPlanarFlow(pair, 2)
    for _ in range(2):
        guide()
        guide.grow(2)
    guide()
    assert len({key.split(".")[0] for key in keys()}) == 3
    del guide
    assert keys() == set()


def test_a_part_that_guides_share_keeps_its_name_in_the_store() -> None:
    """By which Pyro's optimisers ask for the options of each tensor."""
    encoder, store = nn.Linear(1, 2), pyro.get_param_store()
    rows = Y.reshape(-1, 1)
    guides = [pf.AmortizedPlanarGuide(rows_model, "rows", lambda y: rows, encoder=encoder)]
    guides.append(pf.AmortizedPlanarGuide(rows_model, "rows", lambda y: rows, encoder=encoder))
    for guide in guides:
        guide(Y)
    for _ in range(2):
        guide = guides.pop()
        assert store.param_name(encoder.weight) in store
        del guide
        gc.collect()
    assert store.param_name(encoder.weight) is None
    assert keys() == set()


def test_a_call_costs_no_more_where_there_are_many_guides(
    case: tuple[Callable, tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, args = case
    looked = []

    class Counted(dict):
        """Every look at an entry of the store counts, one by one or in a loop."""

        def __getitem__(self, key: str) -> Tensor:
            looked.append(key)
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            looked.append(key)
            return super().__contains__(key)

        def items(self) -> list:
            looked.extend(self)
            return list(super().items())

        def __iter__(self):  # noqa: ANN204
            for key in super().__iter__():
                looked.append(key)
                yield key

    def cleared(self: ParamStoreDict) -> None:
        self._params, self._param_to_name, self._constraints = Counted(), {}, {}

    monkeypatch.setattr(ParamStoreDict, "clear", cleared)
    pyro.clear_param_store()
    guides, first, later = [], [], []
    for _ in range(20):
        guides.append(make().setup(*args))
        for found in (first, later):
            looked.clear()
            guides[-1](*args)
            found.append(len(looked))
    assert later[19] == later[0]
    assert first[19] < 6 * first[0]  # some looks for a free name, as a logarithm
    monkeypatch.undo()
    pyro.clear_param_store()


def test_a_parameter_of_another_stride_is_trained_and_not_a_copy() -> None:
    """Pyro's store copies a tensor that is not contiguous, as its ChannelPermute has one."""

    def model() -> None:
        pyro.sample("z", pyro.distributions.Normal(1.0, 2.0).expand([2]).to_event(1))

    def made(dim: int) -> list:
        to_image = ReshapeTransform((dim,), (dim, 1, 1))
        return [to_image, GeneralizedChannelPermute(dim), to_image.inv]

    guide = pf.AutoFlow(model, made)
    names = []
    for _ in range(3):
        guide()
        names.append(guide._pyro_name)
    assert set(names) == {"AutoFlow"}
    stored = dict(pyro.get_param_store().named_parameters())
    (LU,) = (p for name, p in guide.named_parameters() if name.endswith("LU"))
    assert any(p is LU for p in stored.values())
