"""One running engine and all that belongs to it: slots, dispatcher, what is kept warm, its life.

Requests of the gateway come to the `dispatcher` of a `deployment`; a `life` begins and ends it,
`supervision` watches the engine, `prefixes`, `warm` and `rebuild` keep what is to be warm, and
`proof` holds each reply's count against what was promised.
"""
