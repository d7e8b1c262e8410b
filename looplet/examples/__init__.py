"""Examples that run: `python -m looplet.examples.hello_world --scripted`."""
