"""When bytes can be out of device memory: a model of one step, its bounds, and plans. Integers and floats only."""
