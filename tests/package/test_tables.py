"""Tables: models of scikit-learn and boosters are served by onnxruntime alone, and answer as the model that was trained."""
import json

import mutations
import numpy as np
import pandas as pd
import pytest
from lightgbm import LGBMClassifier
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from xgboost import XGBClassifier

from mlserve.errors import CheckFailed, InvalidInput, MlserveError, Refused, UsageError
from mlserve.package import golden, load_package, save_package
from mlserve.package.convert.columns import table_columns, to_arrays
from mlserve.serving.model import load_model
from mlserve.serving.model.device import Device
from mlserve.wire.predict import decode_predict, encode_predict
from mlserve.wire.scoring import answer_invocations, decode_invocations
from mlserve.wire.v2 import decode_infer

NUMBERS, TEXTS, BOTH = ["age", "income", "visits", "member"], ["city", "job"], ["label", "probabilities"]


def rows(n, seed):
    "A mixed table with gaps, and a label of each row"
    random = np.random.default_rng(seed)
    frame = pd.DataFrame({"age": random.integers(18, 90, n).astype(float), "income": random.lognormal(10, 1, n),
                          "visits": random.integers(0, 30, n), "member": random.random(n) < 0.4,
                          "city": random.choice(["Bern", "Rome", "Oslo", "Köln"], n), "job": random.choice(["a", "b", "c d", "it's"], n)})
    score = frame["age"] / 30 + np.log(frame["income"]) / 5 + (frame["city"] == "Rome") - frame["visits"] / 20 + random.normal(0, 0.6, n)
    for column in ("age", "income", "job"):
        frame[column] = frame[column].where(random.random(n) > 0.1)
    return frame, np.where(score > 4, "yes", "no"), score.to_numpy()


TRAIN, HELD = rows(600, 0), rows(320, 1)


def pipeline(last, impute=True):
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler()) if impute else "passthrough"
    texts = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore", sparse_output=False))
    return make_pipeline(ColumnTransformer([("numbers", numbers, NUMBERS), ("texts", texts, TEXTS)]), last)


def categories(frame):
    return frame.assign(city=frame["city"].astype(pd.CategoricalDtype(["Oslo", "Bern", "Rome", "Köln"])), job=frame["job"].astype(pd.CategoricalDtype(["it's", "a", "b", "c d"])))


MODELS = {"logistic": pipeline(LogisticRegression(max_iter=500)), "forest": pipeline(RandomForestClassifier(20, random_state=0)),
          "forest with gaps": pipeline(RandomForestClassifier(20, random_state=0), impute=False),
          "hist gradient boosting": pipeline(HistGradientBoostingClassifier(max_iter=20), impute=False),
          "gradient boosting": pipeline(GradientBoostingClassifier(n_estimators=20)),
          "pipeline ending in xgboost": pipeline(XGBClassifier(n_estimators=10, n_jobs=1), impute=False),
          "xgboost": XGBClassifier(n_estimators=10, enable_categorical=True, n_jobs=1),
          "lightgbm": LGBMClassifier(n_estimators=10, verbose=-1, n_jobs=1)}


@pytest.mark.parametrize("kind", MODELS)
def test_a_table_is_answered_as_the_model_does(kind, tmp_path):
    "Over held-back rows with gaps; labels may differ where the two probabilities tie"
    boosted = kind in ("xgboost", "lightgbm")
    (frame, y, _), (held, labels, _) = TRAIN, HELD
    if boosted:
        frame, held = categories(frame), categories(held)
    codes = {"no": 0, "yes": 1} if "xgboost" in kind else {"no": "no", "yes": "yes"}
    model = MODELS[kind].fit(frame, np.array([codes[v] for v in y]))
    package = save_package(model, tmp_path / "p", name="table", inputs=frame, outputs=BOTH, holdout=(held, np.array([codes[v] for v in labels])))
    assert [s.optional for s in package.inputs] == [True, True, False, False, False, True]
    assert len(golden(package)[0]["age"]) <= 16 and package.tolerance["ties"] == {"label": "probabilities"}
    served = load_model(load_package(tmp_path / "p"), Device("cpu")).predict(to_arrays(held, table_columns(frame)))
    expected = model.predict_proba(held)
    difference = np.abs(served["probabilities"] - expected).max()
    print(f"{kind}: {difference:.2g} over {len(held)} rows")
    assert difference < 1e-6
    told = served["label"] if served["label"].dtype != object else np.array([v.decode() for v in served["label"]])
    tie = np.abs(expected[:, 0] - expected[:, 1]) < 1e-5
    assert ((told == model.predict(held)) | tie).all()


@pytest.mark.parametrize("names", [["age in years", "age_in_years", "km/h", "the brand"], ["3d", "a.b", "größe ", "(x)"], ["what it says"]], ids=" ".join)
def test_columns_of_any_name_are_taken(names, tmp_path):
    "The converter spells them its own way; one of them is not used by the model at all"
    random = np.random.default_rng(0)
    frame = pd.DataFrame({**{name: random.normal(size=200) for name in names[:-1]}, names[-1]: random.choice(["u", "v", "w"], 200)})
    y = (frame[names[-1]] == "u").to_numpy() ^ (frame[names[0]].to_numpy() > 0 if names[1:] else False)
    pick = ColumnTransformer([("texts", OneHotEncoder(handle_unknown="ignore"), [names[-1]]), ("numbers", StandardScaler(), [name for name in names[:-1] if name != "a.b"])])
    model = make_pipeline(pick, RandomForestClassifier(10, random_state=0)).fit(frame, y.astype(int))
    save_package(model, tmp_path / "p", name="names", inputs=frame, outputs=BOTH)
    served = load_model(load_package(tmp_path / "p"), Device("cpu")).predict(to_arrays(frame, table_columns(frame)))
    assert np.abs(served["probabilities"] - model.predict_proba(frame)).max() < 1e-6


def test_what_is_converted_wrongly_is_refused_with_its_step(tmp_path):
    "An OrdinalEncoder that gives gaps a number of their own is converted, and forgets it: only rows with gaps show that"
    encode = ColumnTransformer([("city", OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=9), ["city"])])
    frame, y, _ = rows(300, 2)
    frame, y = frame[["city"]].where(frame.index.to_series() % 4 > 0, None), np.where(frame.index % 4 > 0, "no", "yes")
    model = make_pipeline(encode, RandomForestClassifier(5, random_state=0)).fit(frame, y)
    with pytest.raises(CheckFailed, match="the step '.*has no true conversion"):
        save_package(model, tmp_path / "p", name="table", inputs=frame, outputs=BOTH)
    assert not (tmp_path / "p").exists()


def test_texts_are_split_and_folded_as_in_training(tmp_path):
    "Letters of every script, over held-back texts; the model takes a series, a list of texts in every other pipeline"
    words = np.array("a good bad film Köln schön STRASSE ÉCOLE naïve 東京 x9 été привет И don't e-mail foo_bar 12 ! ...".split())
    random = np.random.default_rng(0)
    texts = pd.Series([" ".join(random.choice(words, n)) for n in random.integers(0, 9, 500)], name="text")
    labels = np.where(texts.str.contains("schön|good"), "yes", "no")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression()).fit(texts[:200], labels[:200])
    package = save_package(model, tmp_path / "p", name="words", inputs=texts[:200], outputs=BOTH, holdout=(texts[200:], labels[200:]))
    assert [(s.name, s.datatype) for s in package.inputs] == [("text", "BYTES")]
    asked = decode_predict(json.dumps({"inputs": [{"text": text} for text in texts[200:]]}).encode(), package.inputs)
    served = load_model(package, Device("cpu")).predict(asked.inputs)
    assert np.abs(served["probabilities"] - model.predict_proba(texts[200:])).max() < 1e-6
    with pytest.raises(UsageError, match="fitted on 1 columns; inputs has 2"):
        save_package(model, tmp_path / "q", name="words", inputs=pd.DataFrame({"text": texts, "more": texts}), outputs=BOTH)
    greek = make_pipeline(CountVectorizer(), LogisticRegression()).fit(["ΛΌΓΟΣ", "γάτα"], [0, 1])
    with pytest.raises(Refused, match="The step 'countvectorizer › CountVectorizer'.*Greek"):
        save_package(greek, tmp_path / "q", name="words", inputs=pd.Series(["ΛΌΓΟΣ", "γάτα"]), outputs=BOTH)


@pytest.mark.parametrize("labels", [["no", "yes"], [3, 5], ["a", "b", "c"], [0, 1, 2]])
@pytest.mark.parametrize("last", [SVC(), SGDClassifier(random_state=0), LinearSVC(), RidgeClassifier()])
def test_a_classifier_without_probabilities_answers_its_label(last, labels, tmp_path):
    (frame, _, score), (held, _, other) = TRAIN, HELD
    known = np.array(labels)
    y, kept = (known[np.digitize(s, [3.6, 4.2][:len(labels) - 1])] for s in (score, other))
    model = pipeline(last).fit(frame, y)
    package = save_package(model, tmp_path / "p", name="table", inputs=frame, holdout=(held, kept))
    served = load_model(package, Device("cpu")).predict(to_arrays(held, table_columns(frame)))["label"]
    told = served if served.dtype != object else np.array([v.decode() for v in served])
    assert (told == model.predict(held)).all() and set(told) == set(labels)


def test_a_linear_classifier_of_texts_answers_its_label(tmp_path):
    texts = pd.Series(["a good film", "schön", "bad", "a bad film", "good", "not good"] * 20, name="text")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LinearSVC()).fit(texts, ["yes", "yes", "no", "no", "yes", "no"] * 20)
    package = save_package(model, tmp_path / "p", name="words", inputs=texts)
    served = load_model(package, Device("cpu")).predict({"text": np.array([[t.encode()] for t in texts], object)})["label"]
    assert [v.decode() for v in served] == list(model.predict(texts))


def test_several_labels_a_row_are_refused(tmp_path):
    frame, several = TRAIN[0][["visits"]], np.stack([TRAIN[2] > 4, TRAIN[2] > 3]).T.astype(int)
    with pytest.raises(MlserveError) as e:
        save_package(RidgeClassifier().fit(frame, several), tmp_path / "p", name="table", inputs=frame)
    assert "several labels a row" in str(e.value), e.value


def test_every_form_of_a_request_means_the_same_rows(tmp_path):
    "Rows by column name, frames, CSV and V2; a gap only where a column may miss a value"
    frame, y, _ = TRAIN
    package = save_package(pipeline(LogisticRegression(max_iter=500)).fit(frame, y), tmp_path / "p", name="table", inputs=frame, outputs=BOTH)
    model = load_model(package, Device("cpu"))
    cells = {"age": [41.0, None], "income": [None, 12.5], "visits": [3, 4], "member": [True, False], "city": ["Rome", "Köln"], "job": ["a", None]}
    table = [dict(zip(cells, row)) for row in zip(*cells.values())]
    dumped = lambda o: __import__("orjson").dumps(o)  # noqa: E731
    ways = [decode_predict(dumped({"inputs": table}), package.inputs), decode_predict(dumped({"inputs": cells}), package.inputs),
            decode_invocations(dumped({"dataframe_records": table}), package.inputs),
            decode_invocations(dumped({"dataframe_split": {"columns": list(cells), "data": [list(r.values()) for r in table]}}), package.inputs),
            decode_invocations(b"age,income,visits,member,city,job\n41.0,,3.0,True,Rome,a\n,12.5,4,False,K\xc3\xb6ln,\n", package.inputs, media="text/csv"),
            decode_infer(dumped({"parameters": {"content_type": "pd"}, "inputs": [
                {"name": n, "shape": [2], "datatype": {"visits": "FP64"}.get(n, next(s.datatype for s in package.inputs if s.name == n)), "data": c} for n, c in cells.items()]}),
                package.inputs, package.outputs)]
    wanted = model.predict(ways[0].inputs)
    for way in ways[1:]:
        assert {n: str(a) for n, a in way.inputs.items()} == {n: str(a) for n, a in ways[0].inputs.items()}
    rows_of = __import__("orjson").loads
    told = rows_of(encode_predict(wanted, None, ways[0].form))["outputs"]
    assert [set(row) for row in told] == [{"label", "probabilities"}] * 2 and told[0]["label"] == wanted["label"][0].decode()
    assert rows_of(answer_invocations(ways[2], wanted)[0])["predictions"] == told
    for column in ("visits", "member", "city"):
        with pytest.raises(InvalidInput, match=column):
            decode_predict(dumped({"inputs": [table[0] | {column: None}]}), package.inputs)
    with pytest.raises(InvalidInput, match="visits"):
        decode_invocations(b"age,income,visits,member,city,job\n41.0,,,True,Rome,a\n", package.inputs, media="text/csv")
    assert "NaN" not in (tmp_path / "p/serving_input_example.json").read_text() + (tmp_path / "p/input_example.json").read_text()


def test_an_onnx_file_with_maps_or_for_one_row_is_taken(tmp_path):
    "skl2onnx gives probabilities as a list of maps by default; other exporters fix the batch to the example's one row"
    from skl2onnx import to_onnx
    frame = TRAIN[0][["visits"]].to_numpy(np.float32)
    model = LogisticRegression().fit(frame, TRAIN[1])
    graph = to_onnx(model, frame[:1])
    (tmp_path / "maps.onnx").write_bytes(graph.SerializeToString())
    package = save_package(tmp_path / "maps.onnx", tmp_path / "p", name="maps", inputs={"X": frame[:8]}, outputs=["output_label", "output_probability"])
    served = load_model(package, Device("cpu")).predict({"X": frame[:40]})
    assert np.abs(served["output_probability"] - model.predict_proba(frame[:40])).max() < 1e-6
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    (tmp_path / "one.onnx").write_bytes(graph.SerializeToString())
    given = {"model": tmp_path / "one.onnx", "path": tmp_path / "one", "name": "one", "outputs": ["output_label", "output_probability"]}
    with pytest.raises(UsageError, match="batch=False and give one row"):
        save_package(inputs={"X": frame[:8]}, **given)
    assert not save_package(inputs={"X": frame[:1]}, batch=False, **given).batch


@pytest.mark.parametrize("names", [["probabilities", "label"], ["scores", "label"], ["probabilities"], ["proba", "class"], ["Prob", "kind"]], ids=" ".join)
def test_names_of_outputs_in_the_wrong_order_are_refused(names, tmp_path):
    "A label under the name of its probabilities was served"
    frame = TRAIN[0][NUMBERS]
    model = HistGradientBoostingClassifier(max_iter=2).fit(frame, TRAIN[1])
    with pytest.raises(UsageError, match="the first answer of a HistGradientBoostingClassifier is its label, the second its probabilities. Give outputs="):
        save_package(model, tmp_path / "p", "t", frame, names)
    assert not list(tmp_path.iterdir())


def test_names_of_outputs_control_with_its_bug_planted_the_test_fails(tmp_path, monkeypatch):
    mutations.sow("outputs_are_named_in_any_order", monkeypatch.setattr)
    with pytest.raises(pytest.fail.Exception):
        test_names_of_outputs_in_the_wrong_order_are_refused(["probabilities", "label"], tmp_path)
