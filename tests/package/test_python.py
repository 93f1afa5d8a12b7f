"""Models of plain Python: a class in exported cells that reads its files and answers arrays, proved and served as any other."""
import contextlib
import json

import numpy as np
import pandas as pd
import pytest

from mlserve.client import Client
from mlserve.errors import CheckFailed, MlserveError, ModelFailed, Refused, UsageError
from mlserve.package import load_package, load_program, save_package
from mlserve.package.convert import format_of
from mlserve.serving.model import load_model
from mlserve.serving.model.device import Device
from mlserve.wire.predict import decode_predict

SOURCE = """
import json
import numpy as np
class Flats:
    def load(self, files): self.prices = json.loads((files / 'prices.json').read_text())
    def predict(self, area, city):
        each = [self.prices.get(name, 3000.0) for name in city]
        return {'price': np.nan_to_num(area) * each, 'gap': [name is None for name in city], 'city': [str(name) for name in city]}
class Counting(Flats):
    asked = 0
    def predict(self, area, city):
        self.asked += len(area)
        return {'price': np.nan_to_num(area) + self.asked}
class Beside(Flats):
    def predict(self, area, city): return {'price': np.nan_to_num(area) - np.nan_to_num(area).mean()}
class Writing(Flats):
    def predict(self, area, city): area[np.isnan(area)] = 0; city[:] = 'Bern'; return super().predict(area, city)
class Short(Flats):
    def predict(self, area, city): return {'price': area[:1]}
class Objects(Flats):
    def predict(self, area, city): return {'price': [object() for _ in area]}
class Silent:
    def predict(self, area, city): return np.nan_to_num(area)
"""
FRAME = pd.DataFrame({"area": [50.0, None, 70.0, 80.0] * 80, "city": ["Bern", "Rome", None, "Oslo", "Köln"] * 64})


def place_in(folder):
    "A folder with the exported cells and the parameters of a model"
    (folder / "model.py").write_text(SOURCE)
    (folder / "prices.json").write_text(json.dumps({"Bern": 9000.0, "Rome": 4000.0}))
    return folder


@pytest.fixture
def place(tmp_path):
    return place_in(tmp_path)


def live(place, name="Flats"):
    "The object as a notebook has it"
    module = {"__name__": "cells"}
    exec(SOURCE, module)
    model = module[name]()
    if hasattr(model, "load"):
        model.load(place)
    return model


def save(place, name="Flats", inputs=FRAME, outputs=(), **more):
    given = {"format": "python", "handler": place / "model.py", "files": [place / "prices.json"]} | more
    return save_package(live(place, name), place / "package", "flats", inputs, list(outputs), **given)


def expected(place, frame):
    return live(place).predict(frame["area"].to_numpy(), frame["city"].astype(object).where(frame["city"].notna(), None).to_numpy())


def test_a_class_of_python_is_served_as_the_notebook_has_it(place):
    "Over JSON rows, V2 and CSV, with gaps and text; nothing of the notebook is near"
    package = save(place, holdout=(FRAME, np.zeros(len(FRAME))))
    assert package.format == "python" and package.file == package.handler == "handler.py" and not list(package.path.glob("model.*"))
    assert [(s.name, s.datatype, s.optional) for s in package.inputs] == [("area", "FP64", True), ("city", "BYTES", True)]
    want = expected(place, FRAME)
    server = package.serve()
    with contextlib.closing(Client(server.url)) as client:
        rows = FRAME.astype(object).where(FRAME.notna(), None).to_dict("records")
        told = client.http.post("/predict", json={"inputs": rows}).json()["outputs"]
        for name in ("price", "gap", "city"):
            assert [row[name] for row in told] == list(want[name]), name
        csv = client.http.post("/invocations", content=FRAME.to_csv(index=False), headers={"Content-Type": "text/csv"}).json()["predictions"]
        assert csv == told
        city = FRAME["city"].fillna("").to_numpy(object)[:, None]
        answered = client.infer({"area": FRAME[["area"]].to_numpy(), "city": city})
        assert (answered["price"] == want["price"]).all() and [v.decode() for v in answered["city"]] == want["city"]
    assert server.compare(live(place), FRAME).passed and package.check(live(place), FRAME).passed
    server.stop()


def test_A3_a_gap_in_text_is_none_and_no_text(place):
    given = {"area": np.ones((2, 1)), "city": np.array([[b"Bern"], [b""]], object)}
    assert load_program(save(place)).run(given, ["gap"])["gap"].tolist() == [False, True]


def test_arrays_by_name_come_as_they_are(place):
    "No table: dimensions stay, and text without a gap is text"
    package = save(place, inputs={"area": np.ones(3), "city": ["Bern", "", "Rome"]})
    assert [s.shape for s in package.inputs] == [(-1,), (-1,)] and [s.name for s in package.outputs] == ["price", "gap", "city"]
    answer = load_program(package).run({"area": np.ones(1), "city": np.array([b""], object)}, ["city", "gap"])
    assert answer["city"].tolist() == [b""] and answer["gap"].tolist() == [False]


def test_the_parameters_are_part_of_the_digest(place):
    first = save(place).digest
    (place / "prices.json").write_text('{"Bern": 1.0}')
    assert save(place).digest != first


def test_A1_files_that_answer_otherwise_are_refused(place):
    "The notebook's object has other parameters than the file that travels"
    model = live(place)
    model.prices = {"Bern": 1.0}
    with pytest.raises(CheckFailed, match="otherwise|differ"):
        save_package(model, place / "package", "flats", FRAME, [], "python", handler=place / "model.py", files=[place / "prices.json"])
    assert not (place / "package").exists()


@pytest.mark.parametrize("name, words", [("Counting", "keeps what it was asked|otherwise|differ"), ("Beside", "depends on the rows beside it")])
def test_A2_what_is_asked_before_or_beside_changes_no_answer(place, name, words):
    with pytest.raises(CheckFailed, match=words):
        save(place, name)
    assert not (place / "package").exists()


def test_A3_a_class_may_write_to_what_it_is_given(place):
    package = save(place, "Writing")
    given = {"area": np.array([[np.nan], [2.0]]), "city": np.array([[b"Rome"], [b""]], object)}
    kept = {name: array.copy() for name, array in given.items()}
    assert load_program(package).run(given, ["price"])["price"].tolist() == [0, 18000]
    assert given["city"].tolist() == kept["city"].tolist() and np.isnan(given["area"][0, 0])


@pytest.mark.parametrize("name, more, error, words", [
    ("Short", {}, UsageError, "must be the batch"), ("Objects", {}, UsageError, "no array of numbers, truth values or text"),
    ("Flats", {"files": []}, ModelFailed, "'Flats' cannot read its files: FileNotFoundError"),
    ("Flats", {"outputs": ["price", "rent"]}, UsageError, "predict gave price, gap, city; outputs names price, rent"),
    ("Flats", {"dynamic": {"area": {1: "length"}}}, UsageError, "columns of a table are fixed"),
    ("Flats", {"dtype": "float16"}, UsageError, "format='python'"),
    ("Flats", {"handler": False}, UsageError, "is a class of yours: give a handler")])
def test_what_is_refused(place, name, more, error, words):
    with pytest.raises(error, match=words):
        save(place, name, **more)
    assert not (place / "package").exists()


def test_a_pickle_among_the_files_is_refused(place):
    (place / "model.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(Refused, match="do not travel"):
        save(place, files=[place / "prices.json", place / "model.pkl"])


def test_a_class_without_predict_and_one_of_a_library_are_told_the_way(place):
    with pytest.raises(UsageError, match="no method 'predict'"):
        save_package(object(), place / "package", "flats", FRAME, [], "python", handler=place / "model.py")
    with pytest.raises(UsageError, match="a class with predict in exported cells"):
        save_package(live(place), place / "package", "flats", {"area": np.ones(2)}, ["y"])


def test_a_class_of_the_notebook_is_known_as_one():
    class Own:
        def predict(self, x):
            return x
    Own.__module__ = "__main__"
    assert format_of(Own(), {"x": np.ones(2)}) == format_of(Own(), FRAME) == "python"
    assert format_of("model.onnx", {"x": np.ones(2)}) == "onnx" and format_of(object(), {"x": np.ones(2)}) == "torchscript"


def test_a_failure_of_predict_is_the_models(place):
    model = load_model(load_package(save(place, "Silent").path), Device("cpu"))
    model.program.model.predict = lambda **columns: columns["rent"]
    request = decode_predict(json.dumps({"inputs": [{"area": 1, "city": "Bern"}]}).encode(), model.package.inputs)
    with pytest.raises(ModelFailed, match="The model raised KeyError"):
        model.predict(request.inputs)
    with pytest.raises(MlserveError, match="on a GPU|asked for"):
        load_model(model.package, Device("cuda"))
