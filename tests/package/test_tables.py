"""Tables: models of scikit-learn and boosters are served by onnxruntime alone, and answer as the model that was trained."""
import json

import numpy as np
import pandas as pd
import pytest
from lightgbm import LGBMClassifier
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from xgboost import XGBClassifier

from mlserve.errors import CheckFailed, MlserveError, Refused, UsageError
from mlserve.package import golden, load_package, save_package
from mlserve.package.convert import golden_rows
from mlserve.package.convert.columns import table_columns, to_arrays
from mlserve.serving.model import load_model
from mlserve.serving.model.device import Device

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
    assert [s.optional for s in package.inputs] == [True, True, False, False, boosted and False or False, True]
    assert len(golden(package)[0]["age"]) <= 16 and package.tolerance["ties"] == {"label": "probabilities"}
    served = load_model(load_package(tmp_path / "p"), Device("cpu")).predict(to_arrays(held, table_columns(frame)))
    expected = model.predict_proba(held)
    difference = np.abs(served["probabilities"] - expected).max()
    print(f"{kind}: {difference:.2g} over {len(held)} rows")
    assert difference < 1e-6
    told = served["label"] if served["label"].dtype != object else np.array([v.decode() for v in served["label"]])
    tie = np.abs(expected[:, 0] - expected[:, 1]) < 1e-5
    assert ((told == model.predict(held)) | tie).all()
