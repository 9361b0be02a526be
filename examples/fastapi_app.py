"""A FastAPI app behind the queue, as it is: its routes, its docs page, its lifespan, its dependencies.

    mqserve run examples/fastapi_app.py

GET /v1/docs is FastAPI's own page. POST /v1/notes with {"text": "…"} keeps a note in the memory of its replica, GET /v1/notes
lists them. /words counts words by a class whose instance each replica makes once.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from pydantic import BaseModel

import mqserve as serve


class Note(BaseModel):
    text: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, list[Note]]]:
    yield {"notes": []}  # before the replica is ready; what follows the yield runs at its end


app = FastAPI(title="Notes", lifespan=lifespan)


def notes_of(request: Request) -> list[Note]:
    return request.state.notes


Notes = Annotated[list[Note], Depends(notes_of)]


@app.get("/notes")
def list_notes(notes: Notes) -> list[Note]:
    return notes


@app.post("/notes", status_code=201)
async def add_note(note: Note, notes: Notes) -> dict[str, int]:
    notes.append(note)
    return {"count": len(notes)}


serve.mount("/v1", app)

words = FastAPI(title="Words")


@serve.endpoint("/words")
@serve.ingress(words)
class Words:
    def __init__(self) -> None:
        self.stop_words = {"a", "and", "the"}

    @words.get("/count")
    def count(self, text: str) -> int:
        return len([word for word in text.lower().split() if word not in self.stop_words])
