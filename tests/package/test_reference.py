"""The live model is the reference: what depends on values is not frozen, and held-back rows are answered by the model in the notebook."""
import ctypes
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mlserve.package.export.dataflow import readings
from mlserve.errors import CheckFailed, IntegrityError, Refused
from mlserve.package.holdout import beside, read_holdout
from mlserve.package import load_package, load_program, save_package


class Branch(torch.nn.Module):
    def forward(self, x):
        if x.max() > 10:
            x = x / 255
        return x * 2


class Loop(torch.nn.Module):
    def forward(self, x):
        for _ in range(int(x.max())):
            x = x * 0.5
        return x * 2


class BranchInGraph(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.max() > 10, lambda x: x / 255, lambda x: x * 1, (x,)) * 2


class LoopInGraph(torch.nn.Module):
    def forward(self, x):
        n = torch.zeros((), dtype=torch.int64)
        step = torch._higher_order_ops.while_loop
        return step(lambda n, x, top: n < top, lambda n, x, top: (n + 1, x * 0.5, top * 1), (n, x, x.max().to(torch.int64)))[1] * 2


EXAMPLE = {"x": torch.linspace(0, 0.9, 12).reshape(4, 3)}
UNLIKE = np.full((1, 3), 200, np.float32)  # the other side of the branch, and a loop of 200


@pytest.mark.parametrize("format", ["torchscript", "export"])
@pytest.mark.parametrize("model, line, graph", [(Branch, "if x.max() > 10:", BranchInGraph), (Loop, "for _ in range(int(x.max())):", LoopInGraph)],
                         ids=["branch", "loop"])
def test_A1_what_depends_on_values_is_refused_with_its_line_or_kept_whole(tmp_path, model, line, graph, format):
    with pytest.raises(Refused) as e:
        save_package(model(), tmp_path / "p", "net", EXAMPLE, ["y"], format=format)
    assert line in e.value.message and "test_reference.py:" in e.value.message
    assert "torch.jit.script(model), which was tried" in e.value.mend and "torch.cond" in e.value.mend and "handler" in e.value.mend
    assert not list(tmp_path.iterdir())
    kept = torch.jit.script(model()) if format == "torchscript" else graph()
    package = save_package(kept, tmp_path / "p", "net", EXAMPLE, ["y"], format=format, batch=False)  # one maximum decides for all rows
    wanted = model()(torch.from_numpy(UNLIKE)).numpy()
    assert np.allclose(load_program(package).run({"x": UNLIKE}, ["y"])["y"], wanted, rtol=1e-5)


def seen(call, *more):
    values = []
    call(*more, lambda *given: values.append(given) or given[0])
    return any(1.25 in given for given in values)


def in_a_thread(x):
    values = []
    thread = threading.Thread(target=lambda: values.append(x.max().item()))
    thread.start()
    thread.join()
    return values[0]


@pytest.mark.parametrize("read", [
    lambda x: x.clamp(max=x.max().item()), lambda x: x * len(torch.nonzero(x > 0.5)), lambda x: x * 2 if torch.equal(x, x.round()) else x,
    lambda x: x * float(np.asarray(x).max()), lambda x: x.roll(x[0, 0].long() + 1, 1), lambda x: x * torch.tensor([x.max(), 1, 1]),
    lambda x: x[:, x.sum(0).argsort().tolist()], lambda x: x * 2 if "1.25" in str(x.max()) else x, lambda x: x * 2 if "1.25" in f"{x}" else x,
    lambda x: x * 2 if seen(x.clone().apply_) else x, lambda x: x * 2 if seen(x.clone().map_, x) else x, lambda x: x * 2 if seen(x.clone().map2_, x, x) else x,
    lambda x: x + 0 * torch.as_tensor(data=[x[0, 0], x[0, 1], x[0, 2]]), lambda x: x * torch.LongTensor([x.max().long() + 1]),
    lambda x: x * 2 if ctypes.c_float.from_address(x.data_ptr()).value == 1.25 else x, lambda x: x * 2 if in_a_thread(x) == 1.25 else x,
    lambda x: x * 2 if len(x[x == 1.25].split(1)) > 1 else x, lambda x: x * 2 if x[x == 1.25].nbytes else x,
    lambda x: x * 2 if x[(x == 1.25).any(1)].t().contiguous().stride(0) > 1 else x, lambda x: x * 2 if F.one_hot((x == 1.25).long()).shape[-1] > 1 else x,
    lambda x: x * 2 if torch.nn.utils.rnn.pad_sequence([row[row == 1.25] for row in x.unbind(0)]).shape[0] else x,
], ids=["a number", "a length", "equality", "NumPy", "a shift", "a constant", "an order", "text", "formatted text", "a function of Python", "of two", "of three",
        "by keyword", "an old constructor", "an address", "a new thread", "pieces", "bytes", "strides", "classes", "the longest"])
def test_A1_no_way_out_of_a_tensor_is_missed(tmp_path, read):
    class Model(torch.nn.Module):
        def forward(self, x):
            return read(x)
    with pytest.raises(Refused, match=r"reads values of its inputs in Python: .*test_reference.py:"):
        save_package(Model(), tmp_path / "p", "net", EXAMPLE, ["y"])


def packed(x):
    return torch.nn.utils.rnn.pack_padded_sequence(torch.ones(1, 300, 1), x.max().long().reshape(1).clamp(min=1), batch_first=True).batch_sizes


UNSEEN = {"a thread": lambda x: x * 2 if POOL.submit(lambda: float(x.max())).result() < 10 else x,
          "steps of a sequence": lambda x: x * len(packed(x)),
          "what a trace is not asked": lambda x: x if torch.jit.is_tracing() else x.masked_fill(x > 10, 0)}
POOL = ThreadPoolExecutor(1)


@pytest.mark.parametrize("read", UNSEEN.values(), ids=UNSEEN)
def test_A1_the_saved_program_answers_what_is_unlike_the_example(tmp_path, read):
    class Model(torch.nn.Module):
        def forward(self, x):
            return read(x)
    with pytest.raises(CheckFailed, match="otherwise than the live model for") as e:
        save_package(Model(), tmp_path / "p", "net", EXAMPLE, ["y"], batch=False)
    assert "handler" in e.value.mend and not list(tmp_path.iterdir())


class LazyNumber(torch.nn.Module):
    scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = float(x.abs().max())
        return x / self.scale


class LazyTensor(torch.nn.Module):
    mean = None

    def forward(self, x):
        if self.mean is None:
            self.mean, self.std = x.mean(0), x.std(0) + 1
        return (x - self.mean) / self.std


class ByWidth(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        width = int(x.shape[1])
        if width not in self.cache:
            self.cache[width] = x.amax(0, keepdim=True)
        return x / self.cache[width]


@pytest.mark.parametrize("lazy", [LazyNumber, LazyTensor, ByWidth])
@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_A1_a_value_of_the_first_call_is_never_frozen(tmp_path, lazy, format):
    rows = np.linspace(0, 300, 120, dtype=np.float32).reshape(40, 3)
    with pytest.raises((CheckFailed, Refused)):
        save_package(lazy(), tmp_path / "p", "net", EXAMPLE, ["y"], format=format, holdout=(rows, np.arange(40)))
    assert not list(tmp_path.iterdir())


class Rotary(torch.nn.Module):
    "What a first call may keep: a table that follows from sizes alone, and the last mask, for the notebook"
    table = None

    def forward(self, x):
        if self.table is None or len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1]).cos()
        self.last, self.said = x > 0.5, f"{x.dtype} {tuple(x.shape)}"
        return (x * 1000).sin() * self.table


@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_what_a_first_call_keeps_of_sizes_is_no_refusal(tmp_path, format):
    package = save_package(Rotary(), tmp_path / "p", "net", EXAMPLE, ["y"], format=format)
    assert np.allclose(load_program(package).run({"x": UNLIKE}, ["y"])["y"], Rotary()(torch.from_numpy(UNLIKE)), atol=1e-5)


class Sized(torch.nn.Module):
    "Everything that a contract fixes: sizes, types, a mask, a learnt limit, a pick by a mask that the graph makes itself"
    def __init__(self):
        super().__init__()
        self.register_buffer("limit", torch.tensor(3.0))

    def forward(self, x):
        assert x.ndim == 2 and x.shape[1] == 3 and len(x) > 0 and x.is_floating_point()
        if self.limit > 1:
            x = x.clamp(max=self.limit.item())
        x = torch.where(torch.ones(x.shape[1], x.shape[1]).tril()[-1] > 0, x, 0) / float(x.shape[1]) ** 0.5
        return torch.stack([row * 2 for row in x.unbind(1)], 1) + torch.zeros_like(x).masked_fill(x > 9, 1)


def bert(kind, **more):
    import transformers
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, num_labels=3, **more)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24}
class Experts(torch.nn.Module):
    "Each row goes to the two experts that its gate prefers"
    def __init__(self):
        super().__init__()
        self.gate, self.experts = torch.nn.Linear(3, 4), torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out, masks = torch.zeros_like(x), F.one_hot(chosen, 4).permute(2, 1, 0)
        for mask, expert in zip(masks, self.experts):
            place, rows = torch.where(mask)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


@pytest.mark.parametrize("format", ["torchscript", "export"])
def test_rows_that_values_pick_inside_the_graph_are_no_refusal(tmp_path, format):
    torch.manual_seed(0)
    model, rows = Experts().eval(), np.random.default_rng(0).normal(size=(9, 3)).astype("f4") * 3
    package = save_package(model, tmp_path / "p", "net", EXAMPLE, ["y"], format=format)
    assert np.allclose(load_program(package).run({"x": rows}, ["y"])["y"], model(torch.from_numpy(rows)).detach(), atol=1e-5)


class Packed(torch.nn.Module):
    "A recurrent network over sequences of several lengths"
    def __init__(self):
        super().__init__()
        self.words, self.layer = torch.nn.Embedding(50, 6), torch.nn.LSTM(6, 4, batch_first=True, bidirectional=True)

    def forward(self, ids, mask):
        rows = torch.nn.utils.rnn.pack_padded_sequence(self.words(ids), mask.sum(1), batch_first=True, enforce_sorted=False)
        steps, (last, _) = self.layer(rows)
        steps, _ = torch.nn.utils.rnn.pad_packed_sequence(steps, batch_first=True, total_length=ids.shape[1])
        return steps.amax(1) + torch.cat([last[0], last[1]], 1)


SIZED = {"packed": Packed, "hand-written": Sized, "BERT": lambda: bert("Bert", **SMALL), "RoBERTa": lambda: bert("Roberta", **SMALL),
         "DistilBERT": lambda: bert("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=24)}


@pytest.mark.parametrize("name", SIZED)
def test_A1_what_depends_on_sizes_is_no_refusal(tmp_path, name):
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 50, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    inputs = EXAMPLE if name == "hand-written" else {"input_ids": ids, "attention_mask": mask}
    model = SIZED[name]().eval()
    package = save_package(model, tmp_path / "p", "net", inputs, ["logits"])
    other = {"x": np.full((2, 3), 7, np.float32)} if name == "hand-written" else \
        {"input_ids": ids.flip(1).numpy(), "attention_mask": np.ones((3, 8), np.int64)}
    with torch.inference_mode():
        wanted = model(*map(torch.from_numpy, other.values()))
    wanted = wanted if torch.is_tensor(wanted) else wanted["logits"]
    assert np.allclose(load_program(package).run(other, ["logits"])["logits"], wanted.numpy(), rtol=1e-4, atol=1e-5)


def masked(x):
    "Reads what was made from shapes, as models from a hub do"
    mask = torch.ones_like(x, dtype=torch.int64)
    if not mask.all() or torch.zeros_like(x).any() or torch.full_like(x, 3).max() < 3:
        x = x / 2
    width = int(mask.sum(1)[0]) + int(x.new_ones(x.shape).sum(1)[0]) + int(x.new_full((2,), 3.0).sum()) + len(x.new_tensor([1.0, 2.0]).tolist())
    kind = f"{x.dtype} {x.device} {x.type()} {tuple(x.new_zeros(2).tolist())}"
    return x * width if "float32" in kind and torch._shape_as_tensor(x)[1] == 3 and x.stride(1) == 1 else x


def test_what_is_made_from_a_shape_holds_no_values(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x):
            return masked(x)
    package = save_package(Model(), tmp_path / "p", "net", EXAMPLE, ["y"])
    assert np.allclose(load_program(package).run({"x": UNLIKE}, ["y"])["y"], UNLIKE * 14)


@pytest.mark.parametrize("read", [lambda x: x * 2 if np.isclose(x, 1.25).any() else x, lambda x: x * 2 if 1.25 in list(x.storage()) else x], ids=["NumPy", "storage"])
def test_the_line_of_a_refusal_is_the_models(read):
    assert {place.file for place in readings(read, tuple(EXAMPLE.values()))} == {__file__}


class Shortcut(torch.nn.Module):
    "Wrong when traced, for a few numbers that are like no example and no companion of it"
    def forward(self, x):
        return x.masked_fill((x > 1.2) & (x < 1.3), 0) if torch.jit.is_tracing() else x


def test_A1_the_live_model_answers_held_back_rows_and_the_saved_one_must_agree(tmp_path):
    rows = np.linspace(0, 3, 70 * 3, dtype=np.float32).reshape(70, 3)
    save_package(Shortcut(), tmp_path / "p", "net", EXAMPLE, ["y"])
    before = load_package(tmp_path / "p").digest
    with pytest.raises(CheckFailed, match="the live one differ on 70 held-back rows"):
        save_package(Shortcut(), tmp_path / "p", "net", EXAMPLE, ["y"], holdout=(rows, np.arange(70)))
    assert load_package(tmp_path / "p").digest == before and [p.name for p in tmp_path.iterdir()] == ["p"]
    package = save_package(torch.nn.Identity(), tmp_path / "p", "net", EXAMPLE, ["y"], holdout=(rows, np.arange(70)))
    groups, reference = read_holdout(beside(package.path), package.digest)
    assert reference == "live model" and (groups["outputs"]["y"] == rows).all() and (groups["inputs"]["x"] == rows).all()


def test_A1_the_answers_of_another_model_are_never_taken(tmp_path, monkeypatch):
    from mlserve.release.record import log_package
    monkeypatch.setenv("MLSERVE_STATE", str(tmp_path / "state"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    rows = (np.ones((5, 3), np.float32), np.arange(5))
    one = save_package(torch.nn.Linear(3, 2), tmp_path / "one", "net", EXAMPLE, ["y"], holdout=rows)
    other = save_package(torch.nn.Linear(3, 2), tmp_path / "other", "net", EXAMPLE, ["y"])
    assert log_package(one.path).reference == "live model"
    shutil.copyfile(beside(one.path), beside(other.path))
    with pytest.raises(IntegrityError, match=one.digest):
        log_package(other.path)
    beside(other.path).unlink()
    assert log_package(other.path, holdout=rows).reference == "saved program"
    assert log_package(other.path).reference == ""
