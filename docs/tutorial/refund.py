"""An agent's tool call, written with httpx: python refund.py AMOUNT."""

import os
import sys

import httpx

answer = httpx.post(
    "https://localhost:18443/v1/refunds",
    json={"charge": "ch_1", "amount": int(sys.argv[1])},
    headers={"authorization": f"Bearer {os.environ.get('PAYMENTS_KEY', 'none')}"},
)
result = answer.json()
print(answer.status_code, result.get("detail") or result.get("status") or result)
