"""The torch backend. The only room that imports torch, beside the `.bin` reader."""
