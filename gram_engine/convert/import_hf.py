def load_hf_weights(*a): raise NotImplementedError
