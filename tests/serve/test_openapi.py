"""Tests of the OpenAPI document by schemathesis: generated requests are answered as documented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from dave_fast.serve.limits import Limits
from tests.serve.tiny_server import serve_model, serving


def no_failure(ctx, response, case):
    """Fail on a status of 500 or more, except 504, which is documented for a deadline of a millisecond."""
    if response.status_code != 504:
        not_a_server_error(ctx, response, case)


# without positive_data_acceptance: a schema cannot express that bytes are an image or that a name is a class
CHECKS = [
    no_failure,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@pytest.fixture(scope="module")
def schema():
    with serving(Limits(samples=16), [serve_model()]) as (address, _):
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


def probe(schema, examples):
    """Send each operation data that fit its schema, and data that do not."""
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:
        fitting, broken = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=fitting | broken)
        def try_one(case):
            case.call_and_validate(checks=CHECKS)

        try_one()


def test_a_few_of_each_route(schema):
    probe(schema, 4)


@pytest.mark.slow
def test_many_of_each_route(schema):
    probe(schema, 300)
