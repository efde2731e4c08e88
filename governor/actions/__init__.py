"""What governor does to a memcg's processes: each action bounded in time, its result a value."""
