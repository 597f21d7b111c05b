"""What the engines and the gateway share of HTTP and of the chat protocol."""
