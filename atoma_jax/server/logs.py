"""Log lines as JSON: one object a line, whatever is in it, and never a prompt or an answer."""

import json
import logging
import time
import traceback
from typing import Any


class JsonFormatter(logging.Formatter):
    """A record as one line. What callers put into `extra={"fields": {…}}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields: object = record.__dict__.get("fields")
        if isinstance(fields, dict):
            line |= {str(name): value for name, value in fields.items() if value is not None}
        if record.exc_info and record.exc_info[0] is not None:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)


def use_json_logs() -> None:
    """Every handler of this process writes JSON from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonFormatter())
