"""Schemathesis: requests made from the OpenAPI schema, right and wrong ones, find no 5xx and no undocumented answer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from starlette.types import Receive, Scope, Send

from ecar.serving.app import create_app
from served import make_engine

pytestmark = pytest.mark.slow

engine = make_engine()
app = create_app(engine, "tiny")


async def always_on(scope: Scope, receive: Receive, send: Send) -> None:
    """The app without start and end: schemathesis would start and end it with every request."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
    else:
        await app(scope, receive, send)


schema = schemathesis.openapi.from_asgi("/openapi.json", always_on)
load_all_checks()
# Which prompts are classes, which sizes the model has and what may be combined is not in the schema.
NOT_IN_THE_SCHEMA = CHECKS.get_by_names(["positive_data_acceptance"])


@pytest.fixture(scope="module", autouse=True)
def started() -> Iterator[None]:
    engine.start()
    while engine.state != "ready":
        time.sleep(0.01)
    yield
    engine.stop()


@schema.parametrize()
@settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_no_answer_is_a_5xx_or_undocumented(case: schemathesis.Case) -> None:
    case.call_and_validate(excluded_checks=NOT_IN_THE_SCHEMA)
