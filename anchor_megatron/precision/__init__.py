"""The precision lab: how far attention with rotary embedding in BF16 is from what the mathematics promises.

`rope` turns vectors as published implementations do, `attention` compares attention under two turns,
`experiments` are the measurements, `model` takes them inside a transformers model, `findings` says in words
what the numbers show and `report` draws them. `tools/rope_precision.py` is the command.
"""
