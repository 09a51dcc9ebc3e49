"""Whether all ranks are well: what each is doing, who judges it, and how every one of them ends with the same typed error."""
