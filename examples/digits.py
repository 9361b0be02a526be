"""A real model behind a URL: reads handwritten digits.

    mqserve run examples/digits.py

GET /digits/7 classifies image 7 of the data set that ships inside scikit-learn; POST /digits/7 with 64 pixel values
(0 to 16, row by row) as JSON classifies those.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from starlette.responses import JSONResponse

import mqserve as serve


@serve.endpoint("/digits/{image_id:int}", methods=["GET", "POST"])
class Digits:
    """Trained once per replica, in the constructor."""

    def __init__(self) -> None:
        self.images, labels = load_digits(return_X_y=True)
        self.model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        self.model.fit(self.images, labels)

    def __call__(self, request: serve.Request) -> dict | JSONResponse:
        image_id = request.path_params["image_id"]
        if request.method == "POST":
            try:
                pixels = np.asarray(request.data, dtype=float).reshape(64)
            except (TypeError, ValueError):
                wanted = "send 64 pixel values as a JSON list, with -H 'content-type: application/json'"
                return JSONResponse({"detail": wanted}, status_code=422)
        elif image_id < len(self.images):
            pixels = self.images[image_id]
        else:
            return JSONResponse({"detail": f"there are images 0 to {len(self.images) - 1}"}, status_code=404)
        probabilities = self.model.predict_proba([pixels])[0]
        return {"image_id": image_id, "digit": int(probabilities.argmax()), "probabilities": probabilities}
