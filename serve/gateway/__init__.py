"""The chat endpoint: app.py answers, fields.py says what may be asked, upstream.py talks to the engine."""
