"""./dev replay: what the compiler does with a set of models, as hashes that a refactoring has to leave as they are."""
