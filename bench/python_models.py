"""Models of plain Python that `bench/models.py` saves and serves, as exported cells of a notebook would have them."""
import json

import numpy as np
import pandas as pd

TEXTS = ["city", "job"]


class Boosted:
    "CatBoost with columns of categories, from its own file"
    def load(self, files):
        from catboost import CatBoostClassifier
        self.model = CatBoostClassifier().load_model(str(files / "boosted.cbm"))

    def predict(self, **columns):
        frame = pd.DataFrame(columns).fillna(dict.fromkeys(TEXTS, ""))
        return {"label": self.model.predict(frame, thread_count=1), "probabilities": self.model.predict_proba(frame, thread_count=1)}


class Trees:
    "XGBoost, from its own file"
    def load(self, files):
        from xgboost import Booster
        self.model = Booster(model_file=str(files / "trees.ubj"))

    def predict(self, age, income, visits):
        from xgboost import DMatrix
        yes = self.model.predict(DMatrix(np.stack([age, income, visits], axis=1)))
        return {"label": np.where(yes > 0.5, "yes", "no"), "probabilities": np.stack([1 - yes, yes], axis=1)}


class Regression:
    "A regression of statsmodels, from its parameters"
    def load(self, files):
        self.params = pd.Series(json.loads((files / "regression.json").read_text()))

    def predict(self, **columns):
        return design(pd.DataFrame(columns))[self.params.index].to_numpy() @ self.params.to_numpy()


def design(frame):
    "The columns of a regression: a gap is the value zero, and a column says so"
    columns = {"const": 1.0, "visits": frame["visits"], "member": frame["member"].astype(float), "rome": (frame["city"] == "Rome").astype(float)}
    for name, scale in (("age", 30), ("income", 20000)):
        columns |= {name: frame[name].fillna(0) / scale, f"no_{name}": frame[name].isna().astype(float)}
    return pd.DataFrame(columns, index=frame.index)
