"""What clients and workers share: the server, the names on it, who is registered there."""
