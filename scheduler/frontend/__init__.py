"""The front end: speaks gRPC and text to callers, token ids to the core. Decides nothing about who computes when.

A request's way in: server/generation → validation → tokenizer → core_link. Its tokens' way out: core_link → streams → output
(detokenizer, stop_strings) → server/generation. Nothing here would be missed if the process died: the core knows every token.
"""
