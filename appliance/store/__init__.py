"""The SQLite state: one connection, numbered migrations, one module per thing kept."""
