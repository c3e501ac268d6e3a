"""Server side: the pure server step, aggregation rules, and Flower's Strategy hooks over them."""
