"""Only its function is run: the rest would replace `print`."""

import builtins

builtins.print = None
raise SystemExit("a config file was run")


def build_unc_and_template(task, with_image):
    image = "<|IMAGE|>" if with_image else ""
    unconditional = f"<|extra_203|>You are a helpful assistant. USER: {image} ASSISTANT: <|extra_100|>"
    start = f"<|extra_203|>You are a helpful assistant for {task} task. USER: "
    return unconditional, start + image + "{question}" + " ASSISTANT: <|extra_100|>"
