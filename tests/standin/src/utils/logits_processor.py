"""The processed scores of the next token, computed from the complete sequence at every step, without a cache."""

import torch
from transformers import LogitsProcessor

BOS, EOS, IMG, BOI, EOI, EOL, EOF, BOV = 151849, 151850, 151851, 151852, 151853, 151846, 151847, 151854
BIAS = 0.0  # a test adds some to show that the comparison sees it


class Grammar(LogitsProcessor):
    def __init__(self, cfg, unconditional_ids, model, tokenizer, size_of_first_stays):
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.seen = unconditional_ids[0].tolist()
        self.size = None if cfg.target_height is None else (cfg.target_height, cfg.target_width)
        if IMG in self.seen and (self.size is None or not size_of_first_stays):
            self.size = self.declared(self.seen)
        self.prompt = None

    def declared(self, ids):
        last = len(ids) - 1 - ids[::-1].index(IMG)
        first = last - ids[:last][::-1].index(BOI)
        rows, columns = self.tokenizer.decode(ids[first:last]).split("*")
        return int(rows), int(columns)

    def __call__(self, input_ids, scores):
        self.prompt = self.prompt or input_ids.shape[1]
        made = input_ids[0, self.prompt :].tolist()
        kept, inside = [], None
        for token in made:
            if token == BOI and inside is None:
                inside = []
            elif inside is not None:
                inside.append(token)
            if inside is not None or token == EOI:
                kept.append(token)
            if token == EOI:
                inside = None
        if inside is None:
            scores[:, BOV:] = -torch.inf
            return self.filtered(scores, "text")
        if IMG not in inside:
            return self.filtered(self.only(scores, self.header(len(inside), inside)), "image")
        self.size = self.size or self.declared([BOI, *inside])
        rows, columns = self.size
        done = len(inside) - inside.index(IMG)
        if done % (columns + 1) == 0:
            return self.only(scores, [EOI if done == rows * (columns + 1) else EOL])
        everything = torch.tensor([[*self.seen, *kept]], device=input_ids.device)
        c, u = scores.log_softmax(-1), self.model(everything).logits[:, -1].log_softmax(-1)
        guided = self.cfg.classifier_free_guidance * (c - u) + u
        guided[:, :BOV] = -torch.inf
        guided[:, BOV] += BIAS
        return self.filtered(guided, "image")

    def header(self, place, inside):
        if self.size is not None:
            wanted = self.tokenizer.encode(f"{self.size[0]}*{self.size[1]}")
            return [wanted[place]] if place < len(wanted) else [IMG]
        zero, star = self.tokenizer.encode("0")[0], self.tokenizer.encode("*")[0]
        digits = list(range(zero, zero + 10))
        return {0: digits[1:], 1: digits, 2: [star], 3: digits[1:], 4: digits}.get(place, [IMG])

    def only(self, scores, allowed):
        alone = torch.full_like(scores, -torch.inf)
        alone[:, allowed] = scores[:, allowed]
        return alone

    def filtered(self, scores, kind):
        top_k, top_p, temperature = (self.cfg.sampling_params[f"{kind}_{n}"] for n in ("top_k", "top_p", "temperature"))
        scores = scores / temperature
        if 0 < top_k < scores.shape[-1]:
            scores[scores < scores.topk(top_k)[0][:, -1:]] = -torch.inf
        if top_p < 1.0:
            ordered, places = scores.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            before[:, 0] = 0.0
            scores[0, places[0, before[0] > top_p]] = -torch.inf
        return scores
