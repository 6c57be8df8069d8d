"""Other servers' models: which upstream a request goes to, and the bytes there and back.

Knows HTTP and no model: not what is in a prompt, nor how a token is made. Of a request's body it reads the model's name
and what chooses a server; of an answer, whether it is whole. Never imports server.
"""
