"""API keys of the chat endpoint."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from appliance import api
from appliance.store.keys import Keys


class NewKey(BaseModel):
    name: str


def keys_router(keys: Keys) -> APIRouter:
    """List, make and revoke keys."""
    routes = APIRouter(prefix="/v1/keys")

    @routes.get("")
    async def all_keys() -> list[api.Key]:
        return keys.all()

    @routes.post("")
    async def create_key(new: NewKey) -> api.NewKey:
        return keys.create(new.name)

    @routes.delete("/{id}")
    async def revoke_key(id: str) -> api.Key:
        return keys.revoke(id)

    return routes
