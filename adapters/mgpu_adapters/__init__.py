"""One runtime each: what it can do, what memory it takes, which command it wants. Pure."""
