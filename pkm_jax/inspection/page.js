'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const KIND_COLOURS = ['#c3c9d1', '#2b83c6', '#c267a0', '#dd6a13', '#12946f', '#a68400'];
const RAMPS = {
  reads: ['#f1ecd9', '#c5dcb7', '#6fb7ad', '#2f7f9e', '#24477f', '#1b1b4b'],
  frequency: ['#3b1c5a', '#7d2a73', '#c2436a', '#ee7a55', '#f9b36b', '#fbe6b0'].reverse(),
};
const COLOURS = { reads: 'how often read', frequency: 'word frequency', kind: 'kind of word' };
const state = { layer: 0, head: -1, colour: 'reads', word: null, held: false, slot: null };
const $ = id => document.getElementById(id);
const whole = number => number.toLocaleString('en');
const percent = share => share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(1)} %`;

// Elements: make('p', 'class', child or text, …). Texts are never read as HTML.
function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), character => character.charCodeAt(0));
}

for (const layer of data.layers) {
  for (const name in layer.map) layer.map[name] = bytes(layer.map[name]);
  layer.cells = Math.ceil(layer.side / layer.block);
  layer.shown = new Map();    // the slot of most reads with details, by cell
  for (const slot of Object.keys(layer.slots).map(Number)) {
    const cell = cellOf(layer, slot), held = layer.shown.get(cell);
    if (held === undefined || layer.slots[held].rank > layer.slots[slot].rank) layer.shown.set(cell, slot);
  }
}
const current = () => data.layers[state.layer];

function cellOf(layer, slot) {
  const row = Math.floor(Math.floor(slot / layer.side) / layer.block);
  return row * layer.cells + Math.floor((slot % layer.side) / layer.block);
}

function rgb(hex) {
  return [1, 3, 5].map(place => parseInt(hex.slice(place, place + 2), 16));
}

function ramp(name, share) {
  const stops = RAMPS[name], place = share * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  const [from, to] = [rgb(stops[low]), rgb(stops[low + 1])];
  return from.map((value, i) => Math.round(value + part * (to[i] - value)));
}

function colourOf(layer, cell) {
  const level = layer.map[state.colour][cell];
  if (!level) return null;
  return state.colour === 'kind' ? rgb(KIND_COLOURS[level - 1]) : ramp(state.colour, (level - 1) / 254);
}

// The best slots of a word over the heads that are looked at: [slot, weight], best first.
function best(word) {
  const heads = word[3][state.layer];
  const chosen = state.head < 0 ? heads.flat() : heads[state.head];
  return [...chosen].sort((a, b) => b[1] - a[1]);
}

function choice(id, title, options, chosen, choose) {
  const buttons = options.map(([value, label]) => {
    const button = make('button', '', label);
    button.type = 'button';
    button.setAttribute('aria-pressed', value === chosen);
    button.onclick = () => choose(value);
    return button;
  });
  $(id).replaceChildren(...(title ? [make('span', '', title)] : []), ...buttons);
}

function drawChoices() {
  const layer = current();
  choice('layers', 'Layer', data.layers.map((one, i) => [i, String(one.layer)]), state.layer, value => {
    state.layer = value; state.head = Math.min(state.head, current().heads - 1);
    const found = best(state.word)[0];
    state.slot = found && found[0];
    draw();
  });
  const heads = [...Array(layer.heads).keys()].map(head => [head, String(head)]);
  choice('heads', 'Head', [[-1, 'all'], ...heads], state.head, value => { state.head = value; draw(); });
  choice('colours', '', Object.entries(COLOURS), state.colour, value => { state.colour = value; draw(); });
}

const words = [];       // [element, word]
function drawTexts() {
  $('texts').replaceChildren(...data.shown.map(text => {
    const paragraph = make('p');
    text.forEach((word, place) => {
      const special = data.kinds[word[2]] === 'special';
      const element = make('span', special ? 'w special' : 'w', word[1]);
      element.onmouseenter = () => { if (!state.held) look(word); };
      element.onclick = () => {
        const again = state.held && state.word === word;
        state.held = !again;
        look(word);
        state.slot = best(word)[0][0];
        draw();
      };
      words.push([element, word]);
      paragraph.append(word[0] || (special || place === 1 ? ' ' : ''), element);
    });
    return paragraph;
  }));
}

function look(word) {
  state.word = word;
  drawWord();
  drawMarks();
  shade();
}

// Words that read the best slot of the word looked at as their best, too.
function shade() {
  const own = best(state.word)[0][0];
  for (const [element, word] of words) {
    element.classList.toggle('on', word === state.word);
    element.classList.toggle('same', word !== state.word && best(word)[0][0] === own);
  }
}

function drawMap() {
  const layer = current(), canvas = $('map');
  canvas.width = canvas.height = layer.cells;
  const context = canvas.getContext('2d'), image = context.createImageData(layer.cells, layer.cells);
  for (let cell = 0; cell < layer.cells ** 2; cell++) {
    const colour = colourOf(layer, cell);
    if (colour) image.data.set([...colour, 255], 4 * cell);
  }
  context.putImageData(image, 0, 0);
}

function drawLegend() {
  const layer = current(), [least, most] = layer.ranges[state.colour] || [];
  const never = make('span', 'never', make('i'), 'never read');
  never.firstChild.style.background = 'var(--wash)';
  never.firstChild.style.boxShadow = 'inset 0 0 0 1px #d5d5d0';
  if (state.colour === 'kind') {
    const kinds = data.kinds.map((kind, i) => {
      const entry = make('span', '', make('i'), kind);
      entry.firstChild.style.background = KIND_COLOURS[i];
      return entry;
    });
    $('legend').replaceChildren(...kinds, never);
    return;
  }
  const bar = make('span', 'ramp');
  bar.style.background = `linear-gradient(90deg, ${RAMPS[state.colour]})`;
  const label = value => whole(Math.round(10 ** value));
  const unit = state.colour === 'reads' ? 'reads' : 'times in the texts';
  $('legend').replaceChildren(label(least), bar, `${label(most)} ${unit}`, never);
}

function svg(name, attributes) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  return element;
}

function drawMarks() {
  const layer = current(), size = 1000 / layer.cells, marks = [];
  const middle = slot => {
    const cell = cellOf(layer, slot);
    return [(cell % layer.cells + .5) * size, (Math.floor(cell / layer.cells) + .5) * size];
  };
  $('marks').setAttribute('viewBox', '0 0 1000 1000');
  for (const shape of ['halo', 'mark']) {
    for (const [slot, weight] of best(state.word)) {
      const [cx, cy] = middle(slot);
      marks.push(svg('circle', { class: shape, cx, cy, r: 8 + 30 * Math.sqrt(weight) }));
    }
  }
  if (state.slot !== null) {
    const [x, y] = middle(state.slot), half = Math.max(size / 2, 6);
    for (const shape of ['halo', 'held']) {
      marks.push(svg('rect', { class: shape, x: x - half, y: y - half, width: 2 * half, height: 2 * half }));
    }
  }
  $('marks').replaceChildren(...marks);
}

const name = (layer, slot) => `${Math.floor(slot / layer.side)}, ${slot % layer.side}`;

function drawWord() {
  const layer = current(), word = state.word, heads = word[3][state.layer];
  const title = make('div', 'title', make('b', '', word[1]), make('span', '',
    `${data.kinds[word[2]]} · layer ${layer.layer}${state.held ? ' · held' : ''}`));
  const columns = heads.map((reads, head) => [reads, head])
    .filter(([, head]) => state.head < 0 || head === state.head)
    .map(([reads, head]) => make('div', '', make('h3', '', `Head ${head}`), ...reads.map(([slot, weight]) => {
      const known = layer.slots[slot], fill = make('i');
      fill.style.width = `${100 * weight}%`;
      const heard = known ? known.words.slice(0, 8).map(([text]) => text).join(' · ') : '';
      const button = make('button', slot === state.slot ? 'read on' : 'read',
        make('span', 'id', name(layer, slot)), make('span', 'much', percent(weight)), make('span', 'of', heard), make('span', 'fill', fill));
      button.type = 'button';
      button.onclick = () => { state.slot = slot; drawSlot(); drawMarks(); drawWord(); };
      return button;
    })));
  $('word').replaceChildren(make('h2', '', 'Slots of the word'), title,
    make('div', columns.length > 1 ? 'heads' : '', ...columns));
}

function drawSlot() {
  const layer = current(), slot = state.slot, known = layer.slots[slot];
  const heading = make('h2', '', 'Words of the slot');
  if (slot === null || !known) {
    $('slot').replaceChildren(heading, make('p', 'none', slot === null
      ? 'Click a slot on the map.' : `Slot ${name(layer, slot)} is not among the slots read most, of which the page has details.`));
    return;
  }
  const title = make('div', 'title', make('b', '', `Slot ${name(layer, slot)}`), make('span', '',
    `${whole(known.selected)} reads, ${whole(known.best)} as a head’s best · ${whole(known.different)} words`));
  const stack = make('div', 'stack', ...known.kinds.map((share, kind) => {
    const part = make('i');
    part.style.cssText = `width:${100 * share}%;background:${KIND_COLOURS[kind]}`;
    part.title = `${data.kinds[kind]} ${percent(share)}`;
    return part;
  }));
  const table = make('table', '', make('tbody', '', ...known.words.map(([text, share]) =>
    make('tr', '', make('td', '', text), make('td', '', percent(share))))));
  const contexts = make('div', 'kwic', ...known.contexts.map(([before, text, after]) =>
    make('p', '', make('span', '', make('span', '', before)), make('b', '', text), make('span', '', after))));
  const lens = data.lens
    ? make('div', 'lens', ...known.lens.flatMap(text => [make('span', '', text), ' ']))
    : make('p', 'none', 'The model has no head over words.');
  $('slot').replaceChildren(heading, title, stack, make('div', 'two',
    make('div', '', make('h3', '', 'Read by'), table),
    make('div', '', make('h3', '', 'Read with most weight in'), contexts,
      make('h3', '', 'Its value row points to'), lens)));
}

$('map').onclick = event => {
  const layer = current(), box = $('map').getBoundingClientRect();
  const place = offset => Math.min(layer.cells - 1, Math.max(0, Math.floor(offset * layer.cells)));
  const row = place((event.clientY - box.top) / box.height), column = place((event.clientX - box.left) / box.width);
  const found = layer.shown.get(row * layer.cells + column);
  state.slot = found === undefined ? row * layer.block * layer.side + column * layer.block : found;
  drawSlot(); drawMarks(); drawWord();
};

function drawMeta() {
  const layer = current(), slots = layer.side ** 2;
  $('meta').textContent = `${data.model} · ${whole(data.texts)} texts of ${data.source}, ${whole(data.tokens)} tokens · `
    + `the memory of layer ${layer.layer} has ${layer.side}² = ${whole(slots)} slots, of which each of ${layer.heads} heads `
    + `reads ${layer.top_k} a token: ${percent(layer.used)} of them were read, ${percent(layer.best)} as some head’s best, `
    + `and half of all weight is on ${percent(layer.half)}.`;
}

function drawNotes() {
  const notes = [
    ['A slot i, j', 'is a value row and its key, which is made of sub-key i of the first codebook and j of the second: row i and column j of the map.'],
    ['A weight', 'is the share that a slot has in what a head reads for a token; those of a head add up to 100 %. Of a word in several pieces it is the mean over these. Words in a light colour have the same best slot as the word looked at.'],
    ['Read by', 'gives the share of each word in the weight of the slot, over all texts.'],
    ['Word frequency', 'is the mean, over the weight of a slot, of how often its words were there in these texts, on a logarithmic scale.'],
    ['Kinds of word', 'are told by spelling alone: in pieces is a word that the vocabulary cuts up, special are the tokens around a text. A slot has the colour of the kind whose share of its weight exceeds the share of all weight by most; the bar of a slot shows all shares.'],
    ['A value row points to', 'the words that the model’s head gives the highest logits when the row alone, as if it were the output of its layer and added to nothing, passes the last norm and the head. This is a linear lens: it leaves out the layers above, the rows that are read with it and the states they are added to. It shows a direction, not an effect.'],
    ['Counts', current().exact ? 'of slots, words and weights are exact.' : 'of slots are exact; the table of words was full, so each slot kept the words of most weight, and words that came late may be missing.'],
  ];
  $('notes').replaceChildren(...notes.flatMap(([term, text]) => [make('dt', '', term), make('dd', '', text)]));
}

function draw() {
  drawChoices(); drawMeta(); drawMap(); drawLegend(); drawMarks(); drawWord(); drawSlot(); drawNotes(); shade();
}

drawTexts();
state.word = (words.find(([, word]) => data.kinds[word[2]] === 'word' && word[1].length > 5) || words[0])[1];
state.slot = best(state.word)[0][0];
draw();
