"""An agent's question to a model, written with OpenAI's client: python ask.py MODEL."""

import sys

import openai

try:
    answer = openai.OpenAI().chat.completions.create(
        model=sys.argv[1], messages=[{"role": "user", "content": "Why does ch_1 want a refund?"}]
    )
    print(answer.choices[0].message.content)
except openai.APIStatusError as error:
    print(error.status_code, error.response.json()["detail"])
