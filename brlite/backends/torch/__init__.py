"""The torch backend. Only this package and the reader of `.bin` files import torch."""
