"""QuEST: the method, its vocabulary, its loss and patches that illustrate words."""
