"""The core of the appliance: data, training, releases and their state. It knows no HTTP server and no screens."""

__version__ = "0.1.0"
