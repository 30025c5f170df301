'use strict';
// One recording sounds at a time, and a line moves over its pictures.
const players = [...document.querySelectorAll('audio')];
for (const player of players) {
  const cursors = player.closest('.system').querySelectorAll('.cursor');
  player.addEventListener('play', () => players.forEach((other) => other !== player && other.pause()));
  player.addEventListener('timeupdate', () => cursors.forEach((cursor) => {
    cursor.style.left = `${player.duration ? 100 * player.currentTime / player.duration : 0}%`;
  }));
}
