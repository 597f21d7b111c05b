"""The `appliance` command: thin verbs over the client, one file per noun. Loads neither torch nor textual."""
