"""PagerDuty's part in alerts, from its documentation of the Events API v2: it validates events, and keeps incidents.

https://developer.pagerduty.com/docs/events-api-v2-overview · /docs/send-alert-event

Not in the documentation, and assumed: a routing key that PagerDuty does not know is answered as an invalid event.
"""

import json
from collections import Counter
from dataclasses import dataclass, field

import jsonschema
from fakes.serving import Refused, Server

KEY = "R0UT1NGKEYD3FAULT000000000000000"
MAX_BYTES = 512 * 1024

TEXT = {"type": "string", "minLength": 1}
# ISO 8601 with an offset: "2015-07-17T08:42:58.315+0000" is the documentation's example.
TIME = {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:?\d\d)$"}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["routing_key", "event_action"],
    "properties": {
        "routing_key": {"type": "string", "minLength": 32, "maxLength": 32},
        "event_action": {"enum": ["trigger", "acknowledge", "resolve"]},
        "dedup_key": {"type": "string", "minLength": 1, "maxLength": 255},
        "client": TEXT,
        "client_url": TEXT,
        "images": {"type": "array", "items": {"type": "object", "required": ["src"]}},
        "links": {"type": "array", "items": {"type": "object", "required": ["href"]}},
        "payload": {
            "type": "object",
            "additionalProperties": False,
            "required": ["summary", "source", "severity"],
            "properties": {
                "summary": {**TEXT, "maxLength": 1024},
                "source": TEXT,
                "severity": {"enum": ["critical", "error", "warning", "info"]},
                "timestamp": TIME,
                "component": {"type": "string"},
                "group": {"type": "string"},
                "class": {"type": "string"},
                "custom_details": {"type": "object"},
            },
        },
    },
    "if": {"properties": {"event_action": {"const": "trigger"}}},
    "then": {"required": ["payload"]},
    "else": {"required": ["dedup_key"]},
}


@dataclass
class Incident:
    """What a service shows: `events` are its triggers, of which those after the first only add to its log."""

    open: bool = True
    events: list = field(default_factory=list)


class PagerDuty(Server):
    """`incidents` maps a routing key and a dedup key to the incidents that there were, the newest last.

    `accepted` are the events in their order; `dropped` counts resolves of what is not open.
    """

    def __init__(self, *keys):
        super().__init__()
        self.keys = set(keys or (KEY,))
        self.incidents = {}
        self.accepted = []
        self.dropped = Counter()

    @property
    def enqueue(self):
        return f"{self.url}/v2/enqueue"

    def of(self, dedup_key, key=KEY):
        return self.incidents.get((key, dedup_key), [])

    def answer(self, method, path, headers, body):
        if (method, path) != ("POST", "/v2/enqueue"):
            raise Refused(404, None)
        if not headers.get("content-type", "").startswith("application/json"):
            raise Refused(400, invalid("the content type is not application/json"))
        if len(body) > MAX_BYTES:
            raise Refused(413, None)
        try:
            event = json.loads(body, parse_constant=int)
        except ValueError:
            raise Refused(400, invalid("the body is no JSON")) from None
        errors = [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(event)]
        if not errors and event["routing_key"] not in self.keys:
            errors = ["the routing key is not known"]
        if errors:
            raise Refused(400, invalid(*errors))
        self.accepted.append(event)
        key = event.get("dedup_key") or f"made-{len(self.accepted)}"
        self._apply(event, key)
        return 202, {"status": "success", "message": "Event processed", "dedup_key": key}

    def _apply(self, event, key):
        known = self.incidents.setdefault((event["routing_key"], key), [])
        is_open = bool(known and known[-1].open)
        if event["event_action"] == "trigger":
            if not is_open:
                known.append(Incident())
            known[-1].events.append(event)
        elif not is_open:
            self.dropped[key] += 1
        elif event["event_action"] == "resolve":
            known[-1].open = False


def invalid(*errors):
    return {"status": "invalid event", "message": "Event object is invalid", "errors": list(errors)}
