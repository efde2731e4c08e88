"""Ways to an agent's terminal; used in short-lived children only."""
