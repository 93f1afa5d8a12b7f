"""Kinds of models: each is saved in one call, served, and asked about held-back rows over JSON, V2 and CSV.

    python bench/models.py [--out bench/results/DATE-models.md]

The largest difference is from the model that was trained, in its own library, over 320 rows that it has never seen, one in ten of which has a gap
in a column. A kind fails where a difference is above 1e-6 (1e-5 of a regression, whose numbers reach 10), or a label differs that is no tie. CatBoost
and statsmodels bring what the project does not need and lie in `state/tools`, where `make models` puts them. The kinds *in Python* are classes of
`bench/python_models.py` on the libraries' own files, served with `format="python"`. *Voice activity with state* is silero-vad's own file: two
streams in turn, 60 chunks each, whose state the client carries, beside the original alone.
The detector of the tutorial is asked about 320 pictures with none to three squares, and its counts must be equal. It is filled up to four
places; or *ragged*, and then each picture's own boxes are held against what the model finds when it is asked alone.
The rows of Keras and LiteRT are one model each; its server finds nothing of TensorFlow, which lies in `state/tools` too. The `.tflite` files are what
TensorFlow's converter makes of that model: the float one is held against the model, the int8 one against the interpreter alone. *BERT* is a classifier of
transformers with weights from a seed, 80 rows at each of four lengths, some of them padded, and is
asked for its mask before its words, the other way round than it was saved. As ONNX it has `attn_implementation="eager"`: the fused attention of torch
answers a text that is masked from end to end otherwise than ONNX does, and such a save is refused.
"""
import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
from lightgbm import LGBMRegressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingRegressor, StackingClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeClassifier
from xgboost import XGBRegressor

from mlserve.client import Client
from mlserve.package import save_package
from mlserve.package.environment import environment
from mlserve.serving.server import serve_local

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests/package"), str(ROOT / "tests")]
TOOLS = [str(ROOT / "state/tools" / name) for name in ("catboost", "statsmodels", "silero")]
sys.path += TOOLS
KERAS = str(ROOT / "state/tools/keras")  # not for those processes
os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
os.environ["PYTHONPATH"] = os.pathsep.join(TOOLS)  # for the processes of `serve_local`
import python_models  # noqa: E402
from test_tables import BOTH, HELD, MODELS, NUMBERS, TRAIN, categories, pipeline  # noqa: E402

from mlserve.package.convert.columns import to_arrays  # noqa: E402

MORE = {"extra trees": pipeline(ExtraTreesClassifier(20, random_state=0)), "decision tree": pipeline(DecisionTreeClassifier(max_depth=6, random_state=0)),
        "k nearest neighbours": pipeline(KNeighborsClassifier(5)), "naive Bayes": pipeline(GaussianNB()), "multilayer perceptron": pipeline(MLPClassifier((16,), max_iter=200, random_state=0)),
        "SVC, calibrated": pipeline(CalibratedClassifierCV(SVC(random_state=0), cv=3)),
        "stacking": pipeline(StackingClassifier([("tree", DecisionTreeClassifier(max_depth=3, random_state=0)), ("bayes", GaussianNB())], LogisticRegression(), cv=3))}
NUMERIC = {"ridge": pipeline(Ridge()), "hist gradient boosting, regression": pipeline(HistGradientBoostingRegressor(max_iter=20), impute=False),
           "xgboost, regression": XGBRegressor(n_estimators=10, enable_categorical=True, n_jobs=1), "lightgbm, regression": LGBMRegressor(n_estimators=10, verbose=-1, n_jobs=1)}


def kinds():
    "Name, model, its kind of answer, and how its frame is made"
    for name, model in (MODELS | MORE).items():
        yield name, model, "codes" if "xgboost" in name else "labels", categories if name in ("xgboost", "lightgbm") else pd.DataFrame
    for name, model in NUMERIC.items():
        yield name, model, "numbers", categories if "," in name and "hist" not in name else pd.DataFrame
    from catboost import CatBoostClassifier, CatBoostRegressor
    quiet = {"iterations": 20, "verbose": 0, "thread_count": 1, "allow_writing_files": False}
    yield "catboost, columns of numbers", CatBoostClassifier(**quiet), "labels", lambda frame: frame[NUMBERS].astype(float)
    yield "catboost, regression", CatBoostRegressor(**quiet), "numbers", lambda frame: frame[NUMBERS].astype(float)


def in_python(folder):
    "Classes of Python: name, class, its file in a folder, kind of answer, columns, and what the library answers to held-back rows"
    import statsmodels.api as sm
    from catboost import CatBoostClassifier
    from xgboost import DMatrix, train
    (frame, texts, score), (held, _, _) = TRAIN, HELD
    filled, rest = [f.fillna(dict.fromkeys(python_models.TEXTS, "")) for f in (frame, held)], list(frame)
    model = CatBoostClassifier(iterations=40, cat_features=python_models.TEXTS, verbose=0, thread_count=1, allow_writing_files=False).fit(filled[0], texts)
    model.save_model(str(folder / "boosted.cbm"))
    yield "catboost with categories, in Python", python_models.Boosted, "boosted.cbm", "labels", rest, model.predict_proba(filled[1]), model.predict(filled[1])
    columns = ["age", "income", "visits"]
    trees = train({"objective": "binary:logistic", "nthread": 1}, DMatrix(frame[columns].to_numpy(), texts == "yes"), 20)
    trees.save_model(folder / "trees.ubj")
    yes = trees.predict(DMatrix(held[columns].to_numpy()))
    yield "xgboost, in Python", python_models.Trees, "trees.ubj", "labels", columns, np.stack([1 - yes, yes], 1), np.where(yes > 0.5, "yes", "no")
    result = sm.OLS(score, python_models.design(frame)).fit()
    (folder / "regression.json").write_text(result.params.to_json(double_precision=15))
    yield "statsmodels, in Python", python_models.Regression, "regression.json", "numbers", rest, result.predict(python_models.design(held)).to_numpy(), None


def answers(url, frame, outputs):
    "By wire: what the server said, as arrays by name"
    def rows(path, key, body, media):
        answer = httpx.post(url + path, content=body, headers={"Content-Type": media}, trust_env=False, timeout=60)
        answer.raise_for_status()
        table = answer.json()[key]
        return {name: np.array([row[name] for row in table]) for name in outputs}
    plain = frame.astype(object).where(frame.notna(), None).to_dict("records")
    yield "JSON", rows("/predict", "outputs", json.dumps({"inputs": plain}), "application/json")
    text = io.StringIO()
    frame.to_csv(text, index=False)
    yield "CSV", rows("/invocations", "predictions", text.getvalue(), "text/csv")
    with Client(url) as client:
        for name, binary in (("V2", False), ("V2 binary", True)):
            given = client.infer(to_arrays(frame, client_specs(client)), binary=binary)
            yield name, {n: np.array([v.decode() if isinstance(v, bytes) else v for v in given[n]]) for n in outputs}


def keras_mlp():
    "An MLP of Keras, fitted; its answers to held-back rows"
    import keras
    random = np.random.default_rng(0)
    x = random.normal(size=(600, 6)).astype("float32")
    layers = [keras.layers.Dense(16, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.3), keras.layers.Dense(3, activation="softmax")]
    model = keras.Sequential([keras.Input((6,), name="x"), *layers])
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, (x[:, 0] > 0).astype(int) + (x[:, 1] > 0), verbose=0)
    return model, asks(model), [{"x": x[:16]}], [{"x": random.normal(size=(320, 6)).astype("float32")}], True


def asks(model):
    "How a model of Keras is asked itself"
    return lambda given: np.asarray(model(given if given.keys() - {"x", "ids"} else next(iter(given.values())), training=False))


def lite(model, folder, example):
    "A `.tflite` file that TensorFlow's converter makes of a model, in integers where it is shown rows"
    import tensorflow as tf
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if example is not None:
        converter.optimizations, converter.representative_dataset = [tf.lite.Optimize.DEFAULT], lambda: ([row[None]] for row in example)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    file = folder / "mlp.tflite"
    file.write_bytes(converter.convert())
    return file


def lite_float():
    "The MLP of Keras as a file for LiteRT, beside the model itself"
    model, ask, [example], held, table = keras_mlp()
    return lite(model, Path(tempfile.mkdtemp()), None), ask, [example], held, table


def lite_int8():
    "The same in integers, beside the interpreter alone"
    from ai_edge_litert.interpreter import Interpreter
    model, _, [example], [held], table = keras_mlp()
    file = lite(model, Path(tempfile.mkdtemp()), held["x"])
    alone = Interpreter(str(file), num_threads=1)
    alone.allocate_tensors()
    [takes], [gives] = alone.get_input_details(), alone.get_output_details()
    scale, zero = takes["quantization"]

    def ask(given):
        found = []
        for row in given["x"]:
            alone.set_tensor(takes["index"], row[None])
            alone.invoke()
            found.append(alone.get_tensor(gives["index"])[0])
        return np.array(found, "i4")
    example, held = ({"x": np.clip(np.round(given["x"] / scale) + zero, -128, 127).astype("i1")} for given in (example, held))
    return file, ask, [example], [held], table


def bert(attention="sdpa"):
    "A classifier of transformers at four lengths"
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=500, num_labels=3, attn_implementation=attention, **sizes)).eval()
    random = np.random.default_rng(0)

    def given(rows, length, padded=True):
        lengths = random.integers(max(1, length // 2), length + 1, rows) if padded else np.full(rows, length)
        mask = (np.arange(length) < lengths[:, None]).astype("int64")
        return {"input_ids": random.integers(1, 500, (rows, length)) * mask, "attention_mask": mask}

    def ask(some):
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(array) for name, array in some.items()}).logits.numpy()
    held = [dict(reversed(given(80, length).items())) for length in (1, 9, 24, 64)]
    return model, ask, [given(8, 12, False), given(8, 16)], held, False


def keras_lstm():
    "Embedding, LSTM and a layer of Keras, at four lengths"
    import keras
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((None,), dtype="int32"), keras.layers.Embedding(50, 8, mask_zero=True), keras.layers.LSTM(12), keras.layers.Dense(2)])
    examples = [{"ids": random.integers(1, 50, (8, n))} for n in (6, 9)]
    return model, asks(model), examples, [{"ids": random.integers(0, 50, (80, n)).astype("int32")} for n in (3, 6, 9, 17)], False


def keras_two_inputs():
    "A functional model of Keras: a picture and numbers, in another order than it declares them"
    import keras
    random = np.random.default_rng(0)
    picture, numbers = keras.Input((8, 8, 3), name="picture"), keras.Input((4,), name="numbers")
    seen = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(5, 3, activation="relu")(picture))
    model = keras.Model([picture, numbers], keras.layers.Dense(2)(keras.layers.Concatenate()([seen, numbers])))
    def given(n):
        return {"numbers": random.normal(size=(n, 4)).astype("float32"), "picture": random.random((n, 8, 8, 3)).astype("float32")}
    return model, asks(model), [given(8)], [given(320)], False


NETWORKS = {"BERT at four lengths, torchscript": (bert, "torchscript"), "BERT at four lengths, export": (bert, "export"), "BERT at four lengths, onnx": (lambda: bert("eager"), "onnx"),
            "Keras, MLP": (keras_mlp,), "LiteRT, the same MLP": (lite_float,), "LiteRT, the same MLP in int8": (lite_int8,),
            "Keras, LSTM at four lengths": (keras_lstm,), "Keras, picture and numbers": (keras_two_inputs,)}


def timed_save(model, folder, *what, **given):
    "A package, how many seconds it took to be saved and proved, and its kB"
    start = time.perf_counter()
    package = save_package(model, Path(folder) / "p", *what, **given)
    saved = time.perf_counter() - start
    size = sum(f.stat().st_size for f in package.path.rglob("*") if f.is_file())
    return package, f"{saved:.1f}", f"{size / 1000:.0f}"


def measure_network(name, made, format=None):
    "One row of the table, of a network that takes tensors; its server finds nothing of TensorFlow"
    words = name.startswith("BERT")
    if KERAS not in sys.path and not words:
        sys.path.append(KERAS)
    model, ask, examples, held, table = made()
    answer = "logits" if words else "answer"
    with tempfile.TemporaryDirectory() as folder:
        package, *costs = timed_save(model, folder, name="network", inputs=examples if examples[1:] else examples[0], outputs=[answer], format=format)
        found = dict.fromkeys(("JSON", "CSV", "V2", "V2 binary"), 0.0)
        with serve_local(package.path) as url:
            for given in held:
                expected = ask(given)
                for wire, told in network_answers(url, given, table, answer):
                    found[wire] = max(found[wire], float(np.abs(told - expected).max()))
    assert max(found.values()) < 1e-6, (name, found)
    cells = {wire: f"{worst:.1g}" for wire, worst in found.items()} | ({} if table else {"CSV": "–"})
    return [name, f"{len(package.inputs)} tensors" if package.inputs[1:] else "1 tensor", *costs, *cells.values()]


def network_answers(url, given, table, output):
    "By wire: what the server said"
    only = next(iter(given.values()))
    def asked(path, key, body, media):
        answer = httpx.post(url + path, content=body, headers={"Content-Type": media}, trust_env=False, timeout=60)
        answer.raise_for_status()
        return np.array(answer.json()[key])
    body = {name: array.tolist() for name, array in given.items()} if len(given) > 1 else only.tolist()
    yield "JSON", asked("/predict", "outputs", json.dumps({"inputs": body}), "application/json")
    if table:
        text = pd.DataFrame(only).to_csv(index=False, header=False)
        yield "CSV", asked("/invocations", "predictions", text, "text/csv")
    with Client(url) as client:
        for name, binary in (("V2", False), ("V2 binary", True)):
            yield name, client.infer(given, binary=binary)[output]


def client_specs(client):
    "The columns that a server says it takes"
    from mlserve.tensors import TensorSpec
    return [TensorSpec(t["name"], t["datatype"], tuple(t["shape"]), t.get("parameters", {}).get("optional", False)) for t in client.metadata()["inputs"]]


def difference(told, expected, labels):
    "The largest difference of the numbers; labels that differ are counted where they are no ties"
    numbers = told[max(told, key=lambda n: n != "label")].reshape(expected.shape)
    worst = float(np.abs(numbers - expected).max())
    if "label" not in told:
        return worst, 0
    ties = np.abs(np.diff(np.sort(expected, axis=1)[:, -2:], axis=1)).ravel() < 1e-5
    return worst, int(((told["label"].astype(str) != np.array(labels).ravel().astype(str)) & ~ties).sum())


def measure(name, model, kind, framed):
    "One row of the table"
    (frame, texts, score), (held, _, _) = TRAIN, HELD
    frame, held = framed(frame), framed(held)
    target = {"codes": (texts == "yes").astype(int), "labels": texts, "numbers": score}[kind]
    model.fit(frame, target)
    expected = np.asarray(model.predict(held) if kind == "numbers" else model.predict_proba(held))
    return asked(name, model, kind, frame, held, expected, None if kind == "numbers" else model.predict(held))


def asked(name, model, kind, frame, held, expected, labels, **more):
    "One row of the table, of a model and what its library answers"
    outputs = ["value"] if kind == "numbers" else BOTH
    with tempfile.TemporaryDirectory() as folder:
        package, *costs = timed_save(model, folder, name="table", inputs=frame, outputs=outputs, **more)
        with serve_local(package.path) as url:
            found = {wire: difference(told, expected, labels) for wire, told in answers(url, held, outputs)}
    assert all(worst < (1e-6 if kind != "numbers" else 1e-5) and not wrong for worst, wrong in found.values()), (name, found)
    gaps = sum(spec.optional for spec in package.inputs)
    return [name, f"{len(package.inputs)} ({gaps} with gaps)", *costs, *(f"{worst:.1g}" for worst, _ in found.values())]


def measure_python(folder, name, cls, file, kind, columns, expected, labels):
    "One row of the table, of a class of Python"
    model = cls()
    model.load(folder)
    return asked(name, model, kind, TRAIN[0][columns], HELD[0][columns], expected, labels, format="python",
                 handler=python_models.__file__, files=[folder / file])


def streams():
    "Voice activity: name, model, what it is called with for some rows, and what the original answers"
    import torch
    from onnxruntime import InferenceSession
    folder = ROOT / "state/tools/silero/silero_vad/data"
    session, script = InferenceSession(str(folder / "silero_vad.onnx")), torch.jit.load(str(folder / "silero_vad.jit"))._model

    def by_script(input, state, sr=None):
        with torch.inference_mode():
            return [t.numpy() for t in script(torch.from_numpy(input), torch.from_numpy(state))]
    yield "voice activity with state, ONNX", str(folder / "silero_vad.onnx"), {"sr": 16000}, lambda **given: session.run(None, given | {"sr": np.array(16000)})
    yield "voice activity with state, TorchScript", script, {}, by_script


def measure_stream(name, model, scalars, alone):
    "One row of the table: two clients in turn, each with the state of its own stream"
    time_axis = np.arange(62 * 512) / 16000
    waves = [(0.3 * np.sin(2 * np.pi * pitch * time_axis * (1 + time_axis)) * np.sin(9 * time_axis)).astype("f4") for pitch in (180, 320)]
    axes = {"state": 1, "stateN": 1} | dict.fromkeys(scalars)
    example = {"input": np.stack([waves[0][i * 512:i * 512 + 576] for i in range(4)]), "state": np.zeros((2, 4, 128), "f4")} | scalars
    with tempfile.TemporaryDirectory() as folder:
        package, *costs = timed_save(model, folder, name="voice", inputs=example, outputs=["output", "stateN"], batch_axis=axes)
        with serve_local(package.path) as url, Client(url) as client:
            wires = {"JSON": client.predict, "V2": lambda given: client.infer(given, binary=False), "V2 binary": lambda given: client.infer(given, binary=True)}
            found = {wire: streamed(ask, waves, scalars, alone) for wire, ask in wires.items()}
    assert all(worst < 1e-6 for worst in found.values()), (name, found)
    told = {wire: f"{worst:.1g}" for wire, worst in found.items()}
    return [name, f"{len(example)} tensors", *costs, told["JSON"], "–", told["V2"], told["V2 binary"]]


def streamed(ask, waves, scalars, alone):
    "The largest difference of answers and states over 60 chunks of each stream"
    worst, own, theirs = 0.0, [np.zeros((1, 2, 128), "f4") for _ in waves], [np.zeros((2, 1, 128), "f4") for _ in waves]
    for chunk in range(60):
        for i, wave in enumerate(waves):
            samples = wave[None, chunk * 512:chunk * 512 + 576]
            told = ask({"input": samples, "state": own[i]} | scalars)
            own[i], (speech, theirs[i]) = told["stateN"], alone(input=samples, state=theirs[i])
            worst = max(worst, float(np.abs(told["output"] - speech).max()), float(np.abs(own[i] - np.moveaxis(theirs[i], 1, 0)).max()))
    return worst


def measure_detector(name, format):
    "One row of the table: boxes of 320 pictures with none to three squares, filled up to four places"
    from test_detectors import OUTPUTS, Detector, Filled, expected

    def furthest(told, want):
        whole = {n: np.concatenate([part[n] for part in told]) for n in OUTPUTS}
        assert (whole["counts"] == want["counts"]).all(), (name, np.flatnonzero(whole["counts"] != want["counts"]))
        return max(float(np.abs(whole[n] - want[n]).max()) for n in OUTPUTS)
    return detected(name, Filled(Detector().eval(), 4), format, expected, furthest)


def measure_ragged(name, format):
    "The same: each picture's own boxes, beside what it has when it is asked alone"
    from test_detectors import Detector
    from test_ragged import RAGGED, expected

    def furthest(told, want):
        each = {n: [one for part in told for one in part[n]] for n in RAGGED}
        assert [int(k) for part in told for k in part["counts"]] == want["counts"].tolist() == [len(one) for one in each["boxes"]], name
        return max(float(np.abs(got - one).max(initial=0)) for n in RAGGED for got, one in zip(each[n], want[n], strict=True))
    return detected(name, Detector().eval(), format, expected, furthest, ragged=RAGGED)


def detected(name, model, format, expected, furthest, **more):
    "One row of the table, of a detector that is asked for 16 pictures at a time by each wire"
    from test_detectors import EXAMPLE, OUTPUTS, pictures
    places = np.random.default_rng(1).integers(2, 14, (320, 3, 2)).tolist()
    images = pictures(*(some[:i % 4] for i, some in enumerate(places)))["image"]
    want = expected(images)
    with tempfile.TemporaryDirectory() as folder:
        package, *costs = timed_save(model, folder, "detector", EXAMPLE, OUTPUTS, format, **more)
        with serve_local(package.path) as url, Client(url) as client:
            ways = client.predict, lambda given: client.infer(given, binary=False), lambda given: client.infer(given, binary=True)
            worst = [furthest([way({"image": some}) for some in np.split(images, 20)], want) for way in ways]
    assert max(worst) < 1e-6, (name, worst)
    shown = [f"{one:.1g}" for one in worst]
    return [name, f"1 ({want['counts'].sum()} boxes)", *costs, shown[0], "–", *shown[1:]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="kinds with this in their name")
    given = parser.parse_args()
    out, folder = given.out, Path(tempfile.mkdtemp())
    table, code, before = [], 0, os.getloadavg()[0]
    every = [(measure, *kind) for kind in kinds()] + [(lambda *row: measure_python(folder, *row), *kind) for kind in in_python(folder)]
    every += [(measure_stream, *kind) for kind in streams()]
    every += [(measure_detector, f"detector with NMS, {format}", format) for format in ("torchscript", "export", "onnx")]
    every += [(measure_ragged, f"detector with NMS, ragged, {format}", format) for format in ("torchscript", "export", "onnx")]
    every += [(measure_network, name, *made) for name, made in NETWORKS.items()]
    for measured, name, *rest in every:
        if given.only not in name:
            continue
        print(name, "…", file=sys.stderr, flush=True)
        try:
            table.append(measured(name, *rest))
        except Exception as e:  # the other kinds are measured all the same
            code, table = 1, [*table, [name, f"**failed**: {type(e).__name__}: {e}", *[""] * 6]]
    head = ["kind", "columns", "saved and proved in s", "package kB", "JSON", "CSV", "V2", "V2 binary"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---", "---", *["--:"] * 6], *table)]
    sys.path.append(KERAS)  # where the versions stand
    versions = ", ".join(f"{p} {version(p)}" for p in ("scikit-learn", "xgboost-cpu", "lightgbm", "catboost", "statsmodels", "silero-vad", "tensorflow-cpu", "keras", "tf2onnx", "ai-edge-litert", "transformers", "torch", "skl2onnx", "onnxmltools", "onnxruntime", "pandas"))
    cpu = environment()["cpu"]
    text = "\n".join([f"# Kinds of models, {time.strftime('%Y-%m-%d')}", "", f"`make models` on Python {platform.python_version()}: {versions}.", "",
                      f"{os.cpu_count()} cores ({cpu['name']}), load {before:.1f} before and {os.getloadavg()[0]:.1f} after.", "",
                      " ".join(__doc__.split("\n\n")[2].split()), "", *lines, ""])
    print(text)
    if out:
        out.write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
